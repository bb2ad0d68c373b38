"""Progress of quantizing while a model is loaded, and its line at the end."""

import re

import pytest
import torch
from tiny_models import bert_config
from transformers import BertModel
from transformers.utils import logging as hf_logging

from svdq_hf import SVDQConfig, footprint
from svdq_hf.integrations.transformers.load_progress import LoadProgress


@pytest.fixture
def folder(tmp_path, capsys):
    BertModel(bert_config(vocab_size=4000)).save_pretrained(tmp_path)
    capsys.readouterr()
    return tmp_path


def test_layers_and_speed_are_shown_and_one_line_at_the_end(folder, capsys):
    model = BertModel.from_pretrained(folder, quantization_config=SVDQConfig(k=2))
    out, err = capsys.readouterr()
    count = len(footprint(model).layers)
    assert out == ""
    assert f" 0/{count} layers" in err
    before = (folder / "model.safetensors").stat().st_size
    (line,) = [line for line in re.split(r"[\r\n]", err) if "svdq: " in line]
    assert line.endswith("the FP32 embedding: embeddings=True")
    assert f"svdq: {before / 1e6:.1f} MB -> {footprint(model).total_bytes / 1e6:.1f} MB, " in line


def test_the_bar_tells_layers_and_speed():
    progress = LoadProgress(4)
    for _ in range(3):
        progress.begin()
        progress.add(torch.zeros(1000, 1000))
    assert re.search(r"Quantizing:  75%\|.*\| 3/4 layers \[\S+, \d+ MB/s\]", str(progress.bar))
    progress.close()


def test_nothing_is_said_where_transformers_bars_are_off(folder, capsys):
    hf_logging.disable_progress_bar()
    BertModel.from_pretrained(folder, quantization_config=SVDQConfig(k=2))
    assert capsys.readouterr() == ("", "")


def test_a_quantized_model_is_loaded_without_either(folder, tmp_path, capsys):
    BertModel.from_pretrained(folder, quantization_config=SVDQConfig(k=2)).save_pretrained(tmp_path / "q")
    capsys.readouterr()
    BertModel.from_pretrained(tmp_path / "q")
    err = capsys.readouterr().err
    assert "Quantizing" not in err
    assert "svdq:" not in err
