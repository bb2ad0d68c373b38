"""Paths of the kernels in words."""

import pytest
import torch
from tiny_models import llama

from svdq_hf import SVDQConfig, quantize_model, set_compute
from svdq_hf.evaluation.speed import kernel_paths as module
from svdq_hf.evaluation.speed.kernel_paths import REFERENCE, kernel_paths
from svdq_hf.kernels import cpu
from svdq_hf.kernels.native.library import AVX2, AVX512, library

native = pytest.mark.skipif(library() is None, reason="the native library is not built")


@native
@pytest.mark.parametrize(
    ("best", "many", "why"),
    [
        (AVX2, "AVX2, writes blocks of rows, multiplied by torch", "this CPU has no AVX-512"),
        (AVX512, "AVX-512, decodes the codes in registers", None),
    ],
)
def test_each_shape_and_number_of_tokens(monkeypatch, best, many, why):
    monkeypatch.setattr(cpu, "best_path", lambda: best)
    monkeypatch.setattr(cpu, "has_amx", lambda: False)
    found = kernel_paths(quantize_model(llama(), SVDQConfig(k=4)), (1, 64))
    assert {(one.out, one.in_features): one.layers for one in found} == {
        (64, 64): 4,
        (32, 64): 4,
        (96, 64): 4,
        (64, 96): 2,
    }
    for one in found:
        assert one.ways[1].endswith("decodes the codes in registers")
        assert one.ways[64] == many
        assert [text[: len(why or "")] for text in one.why_not_better] == ([] if why is None else [why])


@native
def test_bfloat16_on_tiles(monkeypatch):
    monkeypatch.setattr(cpu, "has_amx", lambda: True)
    (one, *_) = kernel_paths(quantize_model(llama(), SVDQConfig(k=4)), (64,), torch.bfloat16)
    assert "bfloat16" in one.ways[64]


def test_a_fallback_says_why():
    found = kernel_paths(quantize_model(llama(), SVDQConfig(k=4, bits=8)), (1,))
    for one in found:
        assert one.bits == 8
        assert (one.ways == {1: REFERENCE}) == bool(one.why_not_better)


@native
def test_fast_layers_are_apart(monkeypatch):
    monkeypatch.setattr(cpu, "fast_path", lambda: 3)
    model = quantize_model(llama(), SVDQConfig(k=4))
    set_compute(model, "fast")
    assert all("(fast)" in one.ways[1] for one in kernel_paths(model, (1,)))


def test_a_dense_model_has_none():
    assert kernel_paths(llama(), (1,)) == []
    assert set(module.WAYS) == {cpu.DECODED, cpu.ROWS, cpu.BFLOAT16_ROWS}
