import importlib.util

import pytest
import torch
from places import EXAMPLES
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from svdq_hf import SVDQConfig

EXAMPLE = EXAMPLES / "bench_methods.py"
OURS = torch.float32, SVDQConfig


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_methods", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def llama(bench, tmp_path):
    LlamaForCausalLM(LlamaConfig(**bench.SIZES)).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_our_row(bench, llama):
    assert bench.attempt(bench.on_the_fly, llama, *OURS).startswith("yes, ")
    assert bench.attempt(bench.save, llama, *OURS) == "yes"
    assert bench.attempt(bench.dequantize, llama, *OURS) == "yes"


def test_experts_are_counted_by_their_bytes(bench, tmp_path):
    sparse = MixtralConfig(**bench.SIZES, num_local_experts=4, num_experts_per_tok=2)
    MixtralForCausalLM(sparse).save_pretrained(tmp_path)
    dense = torch.float32, lambda: None
    assert bench.attempt(bench.experts, tmp_path, *dense) == "no"
    half = torch.bfloat16, lambda: None
    assert bench.attempt(bench.experts, tmp_path, *half) == "no"


def test_failure_is_a_cell_of_the_table(bench, llama):
    def broken():
        raise ImportError("no such\n  thing")

    assert bench.attempt(bench.save, llama, torch.float32, broken) == "no: ImportError: no such thing"
