"""Experts come out of a file one by one, and the way round that the model wants."""

import pytest
import tiny_experts
import tiny_models as tiny
import torch
from safetensors.torch import load_file, save_file
from tiny_experts import qwen3_vl_moe
from transformers.core_model_loading import Concatenate, MergeModulelist, Transpose, WeightConverter

from svdq_hf import SVDQConfig, quantize_model
from svdq_hf.integrations.transformers.expert_conversions import (
    MergeExperts,
    TransposeExperts,
    without_stacking,
)
from svdq_hf.nn.inventory import svdq_experts
from svdq_hf.quantize.expert_stream import Pieces, fit_together

CONFIG = SVDQConfig(k=32)


@pytest.mark.parametrize("turned", [False, True], ids=["out-in", "in-out"])
def test_a_file_of_either_orientation_is_the_same_model(turned, tmp_path):
    source = qwen3_vl_moe()
    source.save_pretrained(tmp_path / "dense")
    if turned:
        file = tmp_path / "dense" / "model.safetensors"
        tensors = load_file(file)
        stacks = [name for name in tensors if ".experts." in name]
        assert len(stacks) == 4
        tensors |= {name: tensors[name].transpose(1, 2).contiguous() for name in stacks}
        save_file(tensors, file, {"format": "pt"})
    model = type(source).from_pretrained(tmp_path / "dense", quantization_config=CONFIG)
    assert len(list(svdq_experts(model))) == 2
    model.save_pretrained(tmp_path / "quantized")
    again = type(source).from_pretrained(tmp_path / "quantized")
    assert tiny.different_tensors(again, model) == []
    assert tiny.different_tensors(quantize_model(source, CONFIG), model) == []


def test_experts_that_stay_dense_are_turned_too(tmp_path):
    source = qwen3_vl_moe()
    source.save_pretrained(tmp_path)
    config = SVDQConfig(k=32, modules_to_not_convert=["model.language_model.layers.0.mlp.experts"])
    model = type(source).from_pretrained(tmp_path, quantization_config=config)
    kept = "model.language_model.layers.0.mlp.experts"
    assert tiny.different_tensors(model.get_submodule(kept), source.get_submodule(kept)) == []
    assert len(list(svdq_experts(model))) == 1


def test_only_plain_conversions_are_replaced():
    merge = WeightConverter(["a.*.x", "a.*.y"], "a.z", [MergeModulelist(dim=0), Concatenate(dim=1)])
    assert [type(op) for op in without_stacking(merge).operations] == [MergeExperts]
    other = WeightConverter(["a.*.x", "a.*.y"], "a.z", [MergeModulelist(dim=0), Concatenate(dim=2)])
    assert [type(op) for op in without_stacking(other).operations] == [MergeModulelist, Concatenate]
    turn = WeightConverter("a.x", "a.x", [Transpose(1, 2, check_dims=True)])
    assert [type(op) for op in without_stacking(turn).operations] == [TransposeExperts]
    always = WeightConverter("a.x", "a.x", [Transpose(1, 2)])
    assert [type(op) for op in without_stacking(always).operations] == [Transpose]


def test_pieces_are_let_go_as_they_are_read():
    gates, ups = (list(torch.randn(3, 2, 5)) for _ in range(2))
    pieces = Pieces([gates, ups])
    assert pieces.shape == (3, 4, 5)
    wanted = torch.stack([torch.cat(pair) for pair in zip(gates, ups, strict=True)])
    assert torch.equal(torch.stack(list(pieces)), wanted)
    assert all(piece is None for source in pieces._sources for piece in source)


def test_pieces_that_do_not_fit_are_told():
    one, wide = torch.zeros(2, 5), torch.zeros(2, 6)
    assert fit_together([[one, one], [torch.zeros(3, 5)] * 2])
    assert not fit_together([[one, one], [one]])
    assert not fit_together([[one, wide]])
    assert not fit_together([[one, one], [wide, wide]])
    assert not fit_together([[one, one.double()]])
    assert not fit_together([[]])


def test_no_dense_stack_is_ever_made(tmp_path, monkeypatch):
    source = tiny_experts.build("mixtral")
    source.save_pretrained(tmp_path)
    stack, made = torch.stack, []
    monkeypatch.setattr(torch, "stack", lambda *a, **k: (made.append(a), stack(*a, **k))[1])
    model = type(source).from_pretrained(tmp_path, quantization_config=CONFIG)
    assert len(list(svdq_experts(model))) == 2
    assert [len(tensors) for tensors, *_ in made if len(tensors) == 4 and tensors[0].ndim == 2] == []
