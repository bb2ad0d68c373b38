"""The choice between the native library and plain torch: the same parts, and no copy of a large weight."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from svdq_hf import SVDQConfig
from svdq_hf.core.packing import unpack
from svdq_hf.kernels.native import rounding
from svdq_hf.quantize.encoding import made_by
from svdq_hf.quantize.weight import quantize_stack, quantize_weight

pytestmark = pytest.mark.skipif(
    rounding.quantizing() is None, reason="no C compiler built the native library"
)
CONFIGS = {
    "default": SVDQConfig(k=50),
    "best": SVDQConfig.best(),
    "paper": SVDQConfig.paper(k=50),
    "8 bits": SVDQConfig(k=50, bits=8),
    "3 bits": SVDQConfig(k=0, bits=3),
}


@pytest.fixture
def without_library(monkeypatch):
    """Switches the native quantizing off."""

    def switch():
        monkeypatch.setattr(rounding, "quantizing", lambda: None)

    return switch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_weight_has_the_parts_and_facts_of_plain_torch(name, dtype, without_library):
    weight = (torch.randn(64, 400) * torch.randn(400).exp()).to(dtype)
    parts, facts = quantize_weight(weight, CONFIGS[name], "layer")
    assert made_by() == "native"
    without_library()
    assert made_by() == "torch"
    expected, told = quantize_weight(weight, CONFIGS[name], "layer")
    assert parts.keys() == expected.keys()
    for part in parts.keys() - {"weight", "weight_scale"}:
        assert torch.equal(parts[part], expected[part]), part
    codes = (unpack(one["weight"], 400) for one in (parts, expected))
    assert (next(codes) != next(codes)).sum() <= 2
    assert facts["relative_error"] == pytest.approx(told["relative_error"], rel=1e-4)


def test_a_stack_of_experts_takes_the_same_way(without_library):
    stack = torch.randn(3, 70, 64).bfloat16()
    parts, facts = quantize_stack(stack, CONFIGS["default"], "experts", transposed=True)
    without_library()
    expected, told = quantize_stack(stack, CONFIGS["default"], "experts", transposed=True)
    assert torch.equal(parts["salient_values"], expected["salient_values"])
    assert facts["relative_error"] == pytest.approx(told["relative_error"], rel=1e-4)


@pytest.mark.parametrize("name", ["default", "best"])
def test_a_tall_matrix_is_never_copied_as_a_whole(name, monkeypatch):
    """As a head of 262,144 rows is quantized: no tensor of its size comes into being."""
    weight, made = torch.randn(12_000, 400).bfloat16(), [0]
    own = weight.untyped_storage().data_ptr()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            found = function(*args, **(kwargs or {}))
            stores = [found.untyped_storage()] if isinstance(found, torch.Tensor) else []
            made.extend(store.nbytes() for store in stores if store.data_ptr() != own)
            return found

    monkeypatch.setattr("svdq_hf.core.svd.MOST_COPIED", 0)
    with Watch():
        quantize_weight(weight, CONFIGS[name], "head")
    assert max(made) <= 4 * 12_000 * 400 // 2
