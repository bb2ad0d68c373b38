"""Weights at the ends of float32 are quantized rightly or refused; never lost, never unloadable."""

import pytest
import torch
from tiny_models import llama
from transformers import LlamaForCausalLM

from svdq_hf import SVDQConfig, quantize_model
from svdq_hf.checkpoint import quantize_checkpoint
from svdq_hf.format.checks import check_parts
from svdq_hf.quantize.weight import quantize_stack, quantize_weight

GRIDS = [
    {},
    {"levels": "linear", "column_scale": False, "scale_bits": 16},
    {"group_size": "row"},
    {"group_size": "tensor", "scale_bits": 16},
    {"bits": 3},
    {"bits": 8, "levels": "linear"},
]
NAME = "model.layers.1.mlp.up_proj"


def weight(exponent: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A matrix `[32, 192]` whose largest entry is 10 to that power."""
    dense = torch.randn(32, 192, dtype=torch.float64)
    dense[:, 5] *= 30
    return (dense / dense.abs().max() * 10.0**exponent).to(dtype)


@pytest.mark.parametrize("exponent", [-45, -40, -38, -36, -35, -34, -33, -30, 30, 34, 36, 37, 37.5, 38, 38.4])
@pytest.mark.parametrize("choices", GRIDS, ids=str)
def test_a_weight_of_any_size_is_refused_or_as_good_as_one_of_size_one(choices, exponent):
    config = SVDQConfig(k=4, rank=4, **choices)
    _, usual = quantize_weight(weight(0), config, NAME)
    torch.manual_seed(0)
    error = None
    try:
        parts, facts = quantize_weight(weight(exponent), config, NAME)
    except ValueError as found:
        error = str(found)
    if error is not None:
        assert f"could not quantize {NAME}: " in error
        assert "modules_to_not_convert" in error
        assert not -33 <= exponent <= 36
        return
    check_parts(parts, 192, config.scheme)
    assert facts["relative_error"] <= 1.2 * usual["relative_error"]


@pytest.mark.parametrize("exponent", [-50, 39, 300])
def test_float64_that_float32_has_not_is_refused(exponent):
    with pytest.raises(
        ValueError, match=rf"could not quantize {NAME}: its largest weight is 1e[-+]{abs(exponent)}"
    ):
        quantize_weight(weight(exponent, torch.float64), SVDQConfig(k=4), NAME)


def test_zeros_are_no_small_weights():
    _, facts = quantize_weight(torch.zeros(4, 64), SVDQConfig(k=4), NAME)
    assert facts["relative_error"] == 0


def test_the_expert_is_named():
    stack = torch.stack([weight(0), weight(-36)])
    with pytest.raises(ValueError, match="could not quantize experts, expert 1: its largest weight is 1e-36"):
        quantize_stack(stack, SVDQConfig(k=4), "experts")


@pytest.mark.parametrize("size", [1e-36, 3e38])
@pytest.mark.parametrize("choices", [{}, {"lm_head": True}], ids=["layer", "head"])
def test_on_every_way_it_is_refused_and_nothing_is_written(choices, size, tmp_path):
    model = llama()
    layer = model.lm_head if choices else model.get_submodule(NAME)
    with torch.no_grad():
        layer.weight.copy_(layer.weight.double() * (size / layer.weight.abs().max().double()))
    model.save_pretrained(tmp_path / "dense")
    config, words = SVDQConfig(k=4, **choices), r"could not quantize .*its largest weight is (1e-36|3e\+38)"
    with pytest.raises(ValueError, match=words):
        quantize_checkpoint(tmp_path / "dense", tmp_path / "out", config)
    with pytest.raises(ValueError, match=words):
        LlamaForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)
    with pytest.raises(ValueError, match=words):
        quantize_model(model, config)
    assert [file.name for file in tmp_path.iterdir()] == ["dense"]
