import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from svdq_hf.core.column_scale import column_scale
from svdq_hf.core.grid import Grid
from svdq_hf.core.topk import top_positions
from svdq_hf.format.checks import check_parts
from svdq_hf.format.decode import reconstruct
from svdq_hf.format.encode import decompose, relative_error
from svdq_hf.format.parts import Scheme

FULL = Scheme(3, Grid(32, levels="normal", column_scale=True, scale_bits=8))


def test_columns_without_it_are_alike(device):
    weight = torch.randn(200, 90, device=device) * torch.logspace(-3, 3, 90, device=device)
    scale = column_scale(weight)
    assert (scale.dtype, tuple(scale.shape)) == (torch.bfloat16, (90,))
    size = (weight / scale.float()).square().mean(0).sqrt()
    # 200 normal numbers know their root mean square to 5 %; bfloat16 to 0.4 %
    assert size.max() / size.min() < 1.4


def test_a_large_row_does_not_decide_a_column():
    weight = torch.randn(200, 90)
    weight[7] *= 1000 * (torch.arange(90) == 3) + 1
    scale = column_scale(weight).float()
    # as root mean square the column would count about 70 times; its row is large everywhere it counts
    assert scale[3] / scale[4] < 20


def test_scale_of_the_whole_matrix_plays_no_part():
    weight = torch.randn(20, 30)
    assert torch.equal(column_scale(weight), column_scale(weight * 2.0**60))
    assert torch.equal(column_scale(weight), column_scale(weight * 2.0**-60))


def test_columns_of_zeros_and_of_nothing_else():
    weight = torch.randn(8, 6)
    weight[:, 2] = 0
    assert torch.isfinite(column_scale(weight)).all()
    assert (column_scale(weight) > 0).all()
    assert (column_scale(torch.zeros(8, 6)) > 0).all()


def test_uneven_columns_cost_little_with_it():
    weight = torch.randn(64, 256) * torch.logspace(-2, 2, 256)[torch.randperm(256)]
    per_column = []
    for has in (True, False):
        scheme = Scheme(0, Grid(32, levels="normal", column_scale=has))
        none = torch.empty(0, dtype=torch.int32)
        lost = weight - reconstruct(decompose(weight, none, none, scheme), 256, scheme)
        per_column.append((lost.square().sum(0) / weight.square().sum(0)).mean())
    # 4 bits lose about 0.7 % of each column; without a scale of their own, small columns are lost whole
    assert per_column[0] < 0.01
    assert per_column[1] > 0.3


numbers = st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False)
shapes = st.tuples(st.integers(1, 5), st.integers(1, 140))


@given(arrays("float32", shapes, elements=numbers).map(torch.from_numpy))
def test_any_weight_has_parts_that_pass_the_checks_and_lose_less_than_all(weight):
    rows, columns = top_positions(weight.abs(), min(3, weight.numel()))
    scheme = Scheme(min(3, weight.numel()), FULL.grid)
    parts = decompose(weight, rows, columns, scheme)
    check_parts(parts, weight.shape[1], scheme)
    assert torch.isfinite(reconstruct(parts, weight.shape[1], scheme)).all()
    assert relative_error(weight, parts, scheme) <= 1.0
