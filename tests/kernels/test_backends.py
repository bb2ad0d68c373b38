"""The list of backends: who computes, why others do not, and that each computes what the reference does."""

import logging

import pytest
import torch

from svdq_hf.format.parts import StoredWeight
from svdq_hf.kernels import backends, reference
from svdq_hf.kernels.backends import BACKENDS, Choice, backend_for, choice
from svdq_hf.kernels.native import library as native
from svdq_hf.nn.linear import SVDQLinear

GRIDS = [{"group_size": 32}, {"group_size": 8}, {"bits": 3}, {"bits": 8, "group_size": "row"}]


CASES = [
    pytest.param(backend, grid, id=f"{backend.name} {grid}") for backend in BACKENDS for grid in GRIDS
    if backend.name == "reference"
    or (backend.name == "native" and grid != GRIDS[1] and native.library() is not None)
]  # fmt: skip


@pytest.mark.parametrize(("backend", "grid"), CASES)
def test_each_backend_computes_what_the_reference_does(backend, grid, split):
    _, parts, scheme = split(33, 129, 9, **grid)
    stored, numbers = StoredWeight.of(parts), (129, scheme.grid.columns(129))
    x, gradient, bias = torch.randn(3, 129), torch.randn(3, 33), torch.randn(33)
    assert backend.supports(x, stored, *numbers) is None
    y, for_x = (
        reference.linear(x, stored, bias, *numbers),
        reference.input_gradient(gradient, stored, *numbers),
    )
    torch.testing.assert_close(backend.linear(x, stored, bias, *numbers, False), y)
    torch.testing.assert_close(backend.input_gradient(gradient, stored, *numbers), for_x)


def test_the_last_computes_everything():
    assert BACKENDS[-1].name == "reference"
    assert BACKENDS[-1].supports(torch.empty(0, dtype=torch.float64, device="meta"), None, 0, 0) is None


@pytest.mark.skipif(native.library() is None, reason="no native library")
def test_a_choice_says_who_computes_and_why_others_do_not(split):
    _, parts, scheme = split(5, 70, **GRIDS[0])
    layer = SVDQLinear(70, 5, scheme)
    layer.load_parts(parts)
    x = torch.randn(2, 70)
    assert layer.backend(x) == Choice("native", {})
    assert layer.backend(x.double()) == Choice(
        "reference",
        dict.fromkeys(("native", "triton"), "activations are torch.float64, and it sums in float32"),
    )
    layer.compute_dtype = torch.float32
    assert layer.backend(x.double()).taken == "native"


def test_on_another_device_the_reference_computes_and_one_line_says_so(split, caplog):
    """The meta device stands for CUDA, which need not be here."""
    _, parts, scheme = split(5, 70)
    backends._say_reference_computes.cache_clear()
    stored = StoredWeight.of({name: part.to("meta") for name, part in parts.items()})
    call = torch.empty(2, 70, device="meta"), stored, 70, scheme.grid.columns(70)
    with caplog.at_level(logging.WARNING):
        assert [backend_for(*call).name for _ in range(2)] == ["reference"] * 2
    refused = {"native": "the tensors are on meta, not on a CPU", "triton": "Triton has no kernels for meta"}
    assert choice(*call) == Choice("reference", refused)
    assert [record.message.split(":")[0] for record in caplog.records] == [
        "quantized layers on meta are computed by plain torch (Triton has no kernels for meta)"
    ]


def test_a_stored_weight_is_its_parts_by_name(split):
    _, parts, _ = split(5, 70, column_scale=True)
    stored = StoredWeight.of(parts)
    assert stored.as_dict() == parts
    assert stored.levels is None
    assert stored.out == 5
