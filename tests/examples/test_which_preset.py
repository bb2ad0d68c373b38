"""`which_preset.py` of the examples: sizes as a real file has them, and a table."""

import importlib.util
import sys

import pytest
import torch
from places import EXAMPLES
from tiny_models import llama

from svdq_hf import SVDQConfig, footprint, quantize_model


@pytest.fixture
def which(monkeypatch):
    spec = importlib.util.spec_from_file_location("which_preset", EXAMPLES / "which_preset.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, value in {"SIZE": 128, "COPIES": 2, "ROUNDS": 1}.items():
        monkeypatch.setattr(module, name, value)
    return module


@pytest.mark.parametrize("lm_head", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_sizes_are_those_of_a_model(which, lm_head, tied):
    config = SVDQConfig.best(lm_head=lm_head)
    model = llama(tie_word_embeddings=tied).to(torch.bfloat16)
    norms = sum(one.numel() for one in model.parameters() if one.ndim == 1)
    found = footprint(quantize_model(model, config))
    shape = which.Shape(64, 96, 2, 64, 32, 96, tied)
    needed = which.needs(shape, config)
    assert needed.stored == found.total_bytes - 2 * norms
    assert needed.weights == found.weights
    assert needed.stored - needed.read == (0 if tied else 2 * 96 * 64)


def test_a_table_for_each_model_and_preset(which, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["which_preset.py"])
    which.main()
    machine, _, head, _, *rows = capsys.readouterr().out.splitlines()
    assert "GB a second" in machine
    assert head.startswith("| model | preset |")
    assert len(rows) == len(which.MODELS) * len(which.PRESETS)
    assert rows[9].startswith("| 7B (Llama 2) | `best()` | 4.1 | 0.8 |")
