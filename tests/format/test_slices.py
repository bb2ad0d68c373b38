"""A slice, a stack and a list of stacks of stored parts stand for exactly that of matrices."""

import itertools

import pytest
import torch
from torch import Tensor

from svdq_hf.core.grid import Grid
from svdq_hf.core.topk import top_positions
from svdq_hf.format.checks import check_parts
from svdq_hf.format.encode import decompose
from svdq_hf.format.parts import Scheme, part_specs
from svdq_hf.format.slices import (
    StoredMatrix,
    slice_columns,
    slice_rows,
    stack,
    stack_conflict,
    stack_where_possible,
)
from svdq_hf.integrations.vllm.layers import layers_of, linear_of

DEFAULT = {"group_size": 32, "levels": "normal", "column_scale": True, "scale_bits": 8}
GRIDS = {
    "default": DEFAULT,
    "version 1": {"group_size": 64},
    "groups of 8": {**DEFAULT, "group_size": 8},
    "groups of 128": {**DEFAULT, "group_size": 128},
    "row": {"group_size": "row"},
    "tensor": {"group_size": "tensor", "column_scale": True},
    "3 bits": {**DEFAULT, "bits": 3},
    "8 bits": {**DEFAULT, "bits": 8, "levels": "linear"},
}


def stored(out: int, in_features: int, k: int = 40, *, seed: int = 0, **grid: object) -> StoredMatrix:
    weight = torch.randn(out, in_features, generator=torch.Generator().manual_seed(seed))
    rows, columns = top_positions(weight.abs(), k)
    scheme = Scheme(k, Grid(**grid))
    return StoredMatrix(decompose(weight, rows, columns, scheme), in_features, scheme.grid)


def check(piece: StoredMatrix, matrix: Tensor) -> None:
    """It is the format's, stands for `matrix` bit for bit, and the op multiplies by it."""
    check_parts(piece.parts, piece.in_features, piece.scheme)
    specs = part_specs(piece.out_features, piece.in_features, piece.scheme)
    assert piece.parts.keys() == specs.keys()
    assert torch.equal(piece.dequantize(), matrix)
    x = torch.randn(3, piece.in_features)
    # float32: a sum of at most 320 products, in another order
    torch.testing.assert_close(linear_of(layers_of([piece]), x), x @ matrix.T, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_rows_are_the_rows_of_the_matrix(grid):
    whole = stored(24, 96, **grid)
    for rows in (torch.arange(8, 16), torch.tensor([3, 3, 0]), torch.arange(24)):
        check(slice_rows(whole, rows), whole.dequantize()[rows])


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize(("in_features", "parts"), [(96, 2), (96, 4), (128, 2), (320, 5), (160, 2), (40, 2)])
def test_columns_are_the_columns_of_the_matrix(grid, in_features, parts):
    whole = stored(12, in_features, **grid)
    width = in_features // parts
    kept = 0
    for start in range(0, in_features, width):
        try:
            piece = slice_columns(whole, start, start + width)
        except ValueError:
            # the one border that no grid can say: inside of a group, and not at a multiple of 8
            assert (width, start) == (20, 20)
            assert grid["group_size"] in (32, 8)
            return
        check(piece, whole.dequantize()[:, start : start + width])
        kept += piece.scheme.k
    assert kept == 40  # each salient weight is on one device


def test_group_that_a_border_cuts_becomes_smaller_ones():
    whole = stored(4, 192, **{**DEFAULT, "group_size": 192})
    assert slice_columns(whole, 0, 96).grid.group_size == 192  # one group, as before
    assert slice_columns(whole, 96, 192).grid.group_size == 192
    whole = stored(4, 384, **{**DEFAULT, "group_size": 192})
    assert slice_columns(whole, 96, 288).grid.group_size == 32  # 96 is no size of a group
    check(slice_columns(whole, 96, 288), whole.dequantize()[:, 96:288])


@pytest.mark.parametrize(("start", "stop"), [(-1, 8), (8, 8), (0, 97), (96, 97)])
def test_columns_that_are_not_there_are_refused(start, stop):
    with pytest.raises(ValueError, match=f"columns {start} to {stop} of a matrix that has 96"):
        slice_columns(stored(4, 96, **DEFAULT), start, stop)


def test_border_that_no_group_can_say_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"groups of 4.* divide the columns at a multiple of 8"):
        slice_columns(stored(4, 96, **DEFAULT), 20, 60)


@pytest.mark.parametrize("grid", [{**grid, "column_scale": False} for grid in GRIDS.values()], ids=GRIDS)
def test_stack_is_one_matrix_of_all_rows(grid):
    pieces = [stored(out, 96, seed=seed, **grid) for seed, out in enumerate((16, 8, 8))]
    whole = stack(pieces)
    check(whole, torch.cat([piece.dequantize() for piece in pieces]))
    assert [piece.out_features for piece in stack_where_possible(pieces)] == [32]


def test_matrices_with_column_scales_of_their_own_stay_apart():
    pieces = [stored(16, 96, seed=seed, **DEFAULT) for seed in range(3)]
    assert stack_conflict(pieces[0], pieces[1]) == "each has its own column_scale"
    with pytest.raises(
        ValueError, match=r"cannot be stacked: each has its own column_scale.*stack_where_possible"
    ):
        stack(pieces)
    apart = stack_where_possible(pieces)
    assert len(apart) == 3
    x, bias = torch.randn(2, 5, 96), torch.randn(48)
    matrix = torch.cat([piece.dequantize() for piece in pieces])
    y = linear_of(layers_of(apart), x, bias)
    torch.testing.assert_close(y, x @ matrix.T + bias, rtol=1e-5, atol=1e-4)


def test_slices_of_one_matrix_share_its_column_scale_and_stack_again():
    whole = stored(24, 96, **DEFAULT)
    pieces = [slice_rows(whole, torch.arange(start, start + 8)) for start in (0, 8, 16)]
    [again] = stack_where_possible(pieces)
    assert again.parts.keys() == whole.parts.keys()
    assert all(torch.equal(again.parts[name], part) for name, part in whole.parts.items())


@pytest.mark.parametrize(
    ("other", "reason"),
    [({"in_features": 64}, "96 and 64 columns"), ({"group_size": 64}, "grids"), ({"bits": 3}, "grids")],
)
def test_unlike_matrices_are_refused(other, reason):
    plain = {**DEFAULT, "column_scale": False}
    in_features = other.pop("in_features", 96)
    with pytest.raises(ValueError, match=reason):
        stack([stored(8, 96, **plain), stored(8, in_features, **{**plain, **other})])


def test_rows_and_columns_commute():
    whole = stored(24, 96, **DEFAULT)
    rows = torch.arange(8, 16)
    one = slice_columns(slice_rows(whole, rows), 32, 96)
    other = slice_rows(slice_columns(whole, 32, 96), rows)
    assert all(torch.equal(one.parts[name], other.parts[name]) for name in one.parts)


def test_shares_of_a_row_parallel_layer_add_up():
    whole, x = stored(24, 96, **DEFAULT), torch.randn(4, 96)
    shares = [slice_columns(whole, start, start + 48) for start in (0, 48)]
    y = sum(linear_of(layers_of([s]), part) for s, part in zip(shares, x.split(48, -1), strict=True))
    torch.testing.assert_close(y, x @ whole.dequantize().T, rtol=1e-5, atol=1e-4)


def test_pieces_move_and_are_saved_as_layers():
    layers = layers_of([stored(8, 64, seed=seed, **DEFAULT) for seed in range(2)])
    assert not any(parameter.requires_grad for parameter in layers.parameters())
    names = itertools.chain.from_iterable(layer.parts() for layer in layers)
    assert len(layers.state_dict()) == len(list(names))
