"""Products by the Triton kernels against the reference in float64, over grids, shapes, dtypes and tokens."""

import pytest
import torch
from pairwise import pairwise
from triton_products import GRIDS, ROUNDED, assert_right, made

from svdq_hf.format.parts import StoredWeight
from svdq_hf.kernels.triton import backend

CALLS = [(1, 1, 1), (3, 5, 70), (5, 9, 64), (20, 20, 129), (1, 20, 129), (17, 5, 70)]
"""Tokens, out, in."""


@pytest.mark.parametrize(("grid", "call", "dtype"), pairwise(GRIDS, CALLS, [*ROUNDED]), ids=str)
def test_a_product_of_few_tokens_is_summed_in_float32_and_rounded_once(grid, call, dtype, split, device):
    tokens, *shape = call
    stored, *numbers = made(split, *shape, device=device, **grid)
    x, bias = torch.randn(tokens, shape[1], device=device).to(dtype), torch.randn(shape[0], device=device)
    assert backend.supports(x, stored, *numbers) is None
    assert_right(backend.linear(x, stored, bias, *numbers), x, stored, bias, *numbers)


@pytest.mark.parametrize("tokens", [2, 17])
@pytest.mark.parametrize("splits", [2, 3])
def test_columns_in_parts_give_the_same_sums_and_the_same_bits_each_time(tokens, splits, split, device):
    from svdq_hf.kernels.triton import launch

    stored, *numbers = made(split, 9, 600, device=device, **GRIDS[0])
    x, bias = torch.randn(tokens, 600, device=device), torch.randn(9, device=device)
    y, again = (launch.multiply(x, stored, bias, *numbers, splits) for _ in range(2))
    assert_right(y, x, stored, bias, *numbers)
    assert torch.equal(y, again)


def test_columns_are_split_where_rows_are_too_few_for_the_device(device):
    from svdq_hf.kernels.triton import launch
    from svdq_hf.kernels.triton.shapes import Shape

    shape = Shape(rows=64, blocks=2, warps=4, stages=1, programs=2)
    for tiles, in_features, processors, splits in (
        (64, 4096, 132, 4), (512, 4096, 132, 1), (1, 4096, 132, 16), (1, 256, 132, 2), (300, 64, 132, 1),
    ):  # fmt: skip
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(launch, "processors", lambda device, number=processors: number)
            assert launch.splits_for(tiles, in_features, shape, torch.device("cpu")) == splits


@pytest.mark.parametrize("dtype", ROUNDED, ids=str)
def test_a_product_of_many_tokens_rounds_the_weight_as_a_dense_layer_does(dtype, split, device):
    stored, *numbers = made(split, 20, 129, device=device, **GRIDS[0])
    x, bias = torch.randn(2, 40, 129, device=device).to(dtype), torch.randn(20, device=device)
    y = backend.linear(x, stored, bias, *numbers)
    assert_right(y, x, stored, bias, *numbers, more=2 * ROUNDED[dtype])  # of each weight, and before the bias


@pytest.mark.parametrize("k", [0, 1, 300, 350])
@pytest.mark.parametrize("tokens", [2, 20])
def test_no_salient_weights_or_nothing_else(k, tokens, split, device):
    """More than 256 are searched in two steps."""
    stored, *numbers = made(split, 5, 70, k, device=device)
    x = torch.randn(tokens, 70, device=device)
    assert_right(backend.linear(x, stored, None, *numbers), x, stored, None, *numbers)


@pytest.mark.parametrize("batch", [(), (0,), (2, 0, 3), (1, 1, 2), (3, 2)], ids=str)
def test_any_batch_shape(batch, split, device):
    stored, *numbers = made(split, 5, 70, device=device)
    x = torch.randn(*batch, 70, device=device)
    y = backend.linear(x, stored, None, *numbers)
    assert_right(y, x, stored, None, *numbers)
    assert backend.input_gradient(y, stored, *numbers).shape == x.shape


def test_tensors_that_are_not_contiguous_or_not_aligned(split, device):
    stored, *numbers = made(split, 5, 70, device=device, **GRIDS[0])
    x = torch.randn(70, 3, device=device).T
    apart = StoredWeight(*(torch.stack([part, part], -1)[..., 0] if part.ndim else part for part in stored))
    levels = torch.cat([stored.levels[:1], stored.levels])[1:]
    found = backend.linear(x, apart._replace(levels=levels), None, *numbers)
    assert torch.equal(found, backend.linear(x.contiguous(), stored, None, *numbers))


@pytest.mark.parametrize("part", ["salient_rows", "salient_columns"])
@pytest.mark.parametrize("tokens", [1, 70])
def test_wrong_positions_are_refused(part, tokens, split, device):
    stored, *numbers = made(split, 5, 70, device=device)
    wrong = getattr(stored, part).clone()
    wrong[-1] = 70
    with pytest.raises(ValueError, match=f"out of range: {part} has 70"):
        backend.linear(
            torch.randn(tokens, 70, device=device), stored._replace(**{part: wrong}), None, *numbers
        )
