"""Folding changes nothing that a model computes, and is left out where that is not known."""

import pytest
import tiny_gguf
import torch

from svdq_hf.integrations.gguf import quantize as module
from svdq_hf.integrations.gguf.block_types import BlockType
from svdq_hf.integrations.gguf.folding import find_folds, scale_of
from svdq_hf.integrations.gguf.model_file import ModelFile

UNROUNDED = BlockType("F32", 0, 1, 4, lambda rows: rows.contiguous().view(torch.uint8))


@pytest.fixture(scope="module")
def model():
    return tiny_gguf.llama()


@pytest.fixture
def source(model, tmp_path):
    return tiny_gguf.write(model, tmp_path / "dense.gguf")


def readers(path):
    return {name.split(".", 2)[2] for fold in find_folds(ModelFile.open(path)) for name in fold.readers}


def test_a_folded_model_computes_the_same(source, model, tmp_path, monkeypatch):
    """All matrices are scaled, none is rounded: only float32's own rounding remains."""
    chosen = module.block_type
    monkeypatch.setattr(module, "block_type", lambda *one: UNROUNDED if chosen(*one) else None)
    done = module.quantize_gguf(source, tmp_path / "folded.gguf")
    assert done.folded == done.matrices == 14
    tokens = torch.arange(50).unsqueeze(0)
    with torch.no_grad():
        expected = model(tokens).logits
    found = tiny_gguf.logits(tmp_path / "folded.gguf", tokens)
    assert (found - expected).norm() < 1e-5 * expected.norm()
    before, after = (
        tiny_gguf.tensor(file, "blk.0.attn_q.weight") for file in (source, tmp_path / "folded.gguf")
    )
    assert (after / before).std() > 0.1


def test_all_matrices_of_a_layer_are_in_a_pair(source):
    names = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    assert readers(source) == {f"{name}.weight" for name in names}


def test_heads_that_share_values_share_scales(source):
    file = ModelFile.open(source)
    (output,) = (one for one in find_folds(file) if one.readers == ("blk.1.attn_output.weight",))
    columns, rows = scale_of(file, output)
    assert output.taken_by == ("blk.1.attn_v.weight",)
    values, each = tiny_gguf.SHARED, tiny_gguf.HEADS // tiny_gguf.SHARED
    assert torch.equal(columns.view(values, each, -1), rows.view(values, 1, -1).expand(-1, each, -1))


def test_columns_are_more_even_afterwards(source):
    file = ModelFile.open(source)
    for fold in find_folds(file):
        columns, _ = scale_of(file, fold)
        weight = torch.cat([file.weight(name) for name in fold.readers])
        before, after = (one.norm(dim=0).log().std() for one in (weight, weight / columns))
        assert after < before


@pytest.mark.parametrize("extra", ["ffn_gate_inp.weight", "attn_sinks.weight", "attn_q_norm_b.bias"])
def test_a_layer_with_a_tensor_that_is_not_known_is_left_alone(model, extra, tmp_path):
    path = tiny_gguf.write(model, tmp_path / "odd.gguf", add={f"blk.0.{extra}": torch.ones(4)})
    names = {name for fold in find_folds(ModelFile.open(path)) for name in fold.readers}
    assert {name.split(".")[1] for name in names} == {"1"}


def test_an_architecture_that_is_not_known_is_left_alone(model, tmp_path):
    assert find_folds(ModelFile.open(tiny_gguf.write(model, tmp_path / "a.gguf", arch="falcon"))) == []


@pytest.mark.parametrize(
    ("lost", "gone"),
    [
        ("attn_k.weight", {"attn_q.weight", "attn_v.weight", "attn_output.weight"}),
        ("ffn_gate.weight", {"ffn_up.weight", "ffn_down.weight"}),
        ("ffn_norm.weight", {"ffn_gate.weight", "ffn_up.weight"}),
    ],
)
def test_a_pair_that_is_not_whole_is_left_alone(model, lost, gone, tmp_path):
    drop = [f"blk.{layer}.{lost}" for layer in range(tiny_gguf.LAYERS)]
    found = readers(tiny_gguf.write(model, tmp_path / "part.gguf", drop=drop))
    assert not found & (gone | {lost})
    assert found
