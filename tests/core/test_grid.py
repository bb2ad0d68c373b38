from itertools import product
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from svdq_hf.core import rounding
from svdq_hf.core.grid import Grid, ScaleRule
from svdq_hf.core.levels import TABLES
from svdq_hf.core.packing import HIGHEST, LOWEST, RANGES
from svdq_hf.core.rounding import expand, quantize, row_blocks
from svdq_hf.core.scales import RULES as FUNCTIONS

RULES = list(get_args(ScaleRule))
GROUP_SIZES = [8, 16, 32, 64, 128, 192, "row", "tensor"]

BFLOAT16_ROUNDING = 2.0**-8
"""Half of the last of bfloat16's 8 significant bits: the relative error of a rounded scale."""

choices = st.sampled_from(GROUP_SIZES), st.sampled_from(RULES)
grids = st.builds(Grid, *choices)
grids_of_any_bits = st.builds(Grid, *choices, bits=st.sampled_from(list(RANGES)))
shapes = st.tuples(st.integers(1, 5), st.integers(1, 140))
numbers = st.floats(-16, 16, width=32, allow_subnormal=False).filter(lambda x: x == 0 or abs(x) > 1e-30)
weights = arrays(np.float32, shapes, elements=numbers).map(torch.from_numpy)
every_grid = pytest.mark.parametrize("size", GROUP_SIZES)
every_rule = pytest.mark.parametrize("rule", RULES)


def steps(scale, grid, weight):
    """The scale of each weight, float64 `[out, in]`."""
    return expand(scale, grid.columns(weight.shape[1]), weight.shape[1]).double().expand(weight.shape)


def test_scales_of_8_bits_are_whole_numbers_of_their_rows(device):
    weight = torch.randn(5, 140, device=device)
    weight[2] = 0
    grid = Grid(32, scale_bits=8)
    codes, scale, row_scale = quantize(weight, grid)
    assert (scale.dtype, row_scale.dtype, tuple(row_scale.shape)) == (torch.int8, torch.bfloat16, (5,))
    top = scale.abs().amax(1)
    assert (top[[0, 1, 3, 4]] >= 126).all()  # the row's largest, but for bfloat16's rounding of the unit
    assert not scale[2].any()
    assert not codes[2].any()
    exact = quantize(weight, Grid(32)).scale.float()
    # half a unit, and the 2**-9 by which bfloat16 rounds each of both
    unit = row_scale.float().unsqueeze(1)
    assert ((scale * unit - exact).abs() <= unit / 2 + exact.abs() * 2 * BFLOAT16_ROUNDING).all()


def test_scales_of_8_bits_are_only_groups(device):
    for size in ("row", "tensor"):
        found = quantize(torch.randn(5, 140, device=device), Grid(size, scale_bits=8))
        assert (found.scale.dtype, found.row_scale) == (torch.float32, None)


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("size", [8, 64, "row", "tensor"])
@every_rule
def test_a_code_is_that_of_the_nearest_normal_level(size, rule, bits):
    weight, grid = torch.randn(5, 140), Grid(size, rule, levels="normal", bits=bits)
    codes, scale, _ = quantize(weight, grid)
    step, table = steps(scale, grid, weight), torch.tensor(TABLES[bits]["normal"])
    error = (weight / step - table[codes.long() - RANGES[bits][0]]).abs()
    best = ((weight / step).unsqueeze(-1) - table).abs().amin(-1)
    # weight / scale, at most 300 here, is rounded to float32 first
    assert (error <= best + 300 * 2.0**-23).all()


def test_normal_levels_lose_less_of_normal_weights():
    weight = torch.randn(64, 640)
    lost = [
        float((weight - reconstructed(weight, Grid(64, levels=levels))).square().sum())
        for levels in ("normal", "linear")
    ]
    # a quantizer of 16 levels for a normal variable loses 0.0095 of its variance, a uniform one 0.0115
    # (Max 1960); groups of 64 know their own range as well
    assert lost[0] < 0.92 * lost[1]


def test_more_bits_lose_less_of_normal_weights():
    weight = torch.randn(200, 320)
    grids = {3: Grid(32, levels="normal", bits=3), 4: Grid(32, levels="normal"), 8: Grid(32, bits=8)}
    lost = {
        bits: float((weight - reconstructed(weight, grid)).square().mean()) for bits, grid in grids.items()
    }
    # quantizers of 8 and 16 levels for a normal variable lose 0.0345 and 0.0095 of its variance (Max 1960);
    # groups of 32 know their own range as well
    assert 0.6 * 0.0345 < lost[3] < 0.8 * 0.0345
    assert 0.5 * 0.0095 < lost[4] < 0.7 * 0.0095
    # of 8 bits almost nothing is clipped: steps of the group's largest over 127, each losing step**2 / 12
    step = weight.view(-1, 32).abs().amax(1) / 127
    assert lost[8] == pytest.approx(float(step.square().mean()) / 12, rel=0.1)


@pytest.mark.parametrize("rule", ["mse", "absmax"])
def test_codes_of_8_bits_have_no_side_with_one_more(rule):
    codes, scale, _ = quantize(torch.randn(50, 64) ** 3, Grid(64, rule, bits=8))
    assert codes.amin() == -127
    assert codes.amax() == 127
    assert (scale > 0).all()


@pytest.mark.parametrize("bits", [2, 5, 16, 4.0, "4", True, None], ids=repr)
def test_bits_that_have_no_codes_are_refused(bits):
    with pytest.raises(ValueError, match=r"^bits=.*: must be one of \[3, 4, 8\]"):
        Grid(bits=bits)


def test_levels_of_8_bits_are_the_codes():
    with pytest.raises(ValueError, match=r"^levels='normal': must be one of \['linear'\] where bits is 8"):
        Grid(bits=8, levels="normal")


def reconstructed(weight, grid):
    codes, scale, _ = quantize(weight, grid)
    return torch.tensor(grid.table)[codes.long() - RANGES[grid.bits][0]] * steps(scale, grid, weight)


def dequantized(weight, grid):
    codes, scale, _ = quantize(weight, grid)
    return codes.double() * steps(scale, grid, weight)


@pytest.mark.parametrize(
    ("size", "shape", "dtype"),
    [
        (8, (3, 18), torch.bfloat16),
        (16, (3, 9), torch.bfloat16),
        (32, (3, 5), torch.bfloat16),
        (64, (3, 3), torch.bfloat16),
        (128, (3, 2), torch.bfloat16),
        (192, (3, 1), torch.bfloat16),
        ("row", (3, 1), torch.float32),
        ("tensor", (1, 1), torch.float32),
    ],
)
@every_rule
def test_scales_of_3_by_140(size, shape, dtype, rule, device):
    grid = Grid(size, rule)
    codes, scale, _ = quantize(torch.randn(3, 140, device=device), grid)
    assert (tuple(scale.shape), scale.dtype) == (shape, dtype) == (grid.scale_shape(3, 140), grid.scale_dtype)
    assert (tuple(codes.shape), codes.dtype) == ((3, 140), torch.int8)


@given(weights, grids_of_any_bits)
def test_a_code_is_the_nearest_multiple_of_its_scale(weight, grid):
    codes, scale, _ = quantize(weight, grid)
    step = steps(scale, grid, weight)
    levels = torch.where(step == 0, 0.0, weight.double() / step)
    error = (levels - codes).abs()
    # In steps; weight / scale, at most about 8 here (128 of 8 bits), is rounded to float32 first.
    lowest, highest = RANGES[grid.bits]
    rounding = 2.0 ** (grid.bits - 1 - 24)
    inside = (codes > lowest) & (codes < highest)
    assert (error[inside] <= 0.5 + rounding).all()
    assert (levels[codes == highest] >= highest - 0.5 - rounding).all()
    assert (levels[codes == lowest] <= lowest + 0.5 + rounding).all()


@given(weights, st.sampled_from(GROUP_SIZES))
def test_absmax_clips_nothing(weight, size):
    grid = Grid(size, "absmax")
    codes, scale, _ = quantize(weight, grid)
    step = steps(scale, grid, weight)
    # The largest weight is 7 steps, give or take the rounding of the scale (float32's is far less).
    bound = 0.5 + 7.1 * BFLOAT16_ROUNDING
    assert ((weight.double() - codes * step).abs() <= bound * step).all()


@given(weights, grids_of_any_bits)
def test_no_weight_gets_farther_away_than_zero_is(weight, grid):
    error = (weight.double() - dequantized(weight, grid)).abs()
    assert (error <= weight.abs() * (1 + 2.0**-20)).all()  # float32's rounding of weight / scale


@every_rule
@every_grid
@pytest.mark.parametrize("power", [-60, -3, 1, 40])
def test_a_power_of_two_scales_the_result_by_itself(size, rule, power):
    weight, grid = torch.randn(4, 200), Grid(size, rule)
    codes, scale, _ = quantize(weight, grid)
    codes_of_scaled, scaled, _ = quantize(weight * 2.0**power, grid)
    assert torch.equal(codes_of_scaled, codes)
    assert torch.equal(scaled, scale * 2.0**power)


@given(weights, grids, st.integers(-30, 30))
def test_a_power_of_two_scales_any_result_by_itself(weight, grid, power):
    codes, scale, _ = quantize(weight, grid)
    codes_of_scaled, scaled, _ = quantize(weight * 2.0**power, grid)
    assert torch.equal(codes_of_scaled, codes)
    assert torch.equal(scaled.double(), scale.double() * 2.0**power)


@every_rule
@every_grid
def test_zeros_have_scale_zero_and_code_zero(size, rule):
    codes, scale, _ = quantize(torch.zeros(3, 140), Grid(size, rule))
    assert codes.count_nonzero() == scale.count_nonzero() == 0


@every_rule
def test_a_group_of_zeros_beside_others_has_scale_zero(rule):
    weight = torch.randn(2, 192)
    weight[0, 64:128] = 0
    codes, scale, _ = quantize(weight, Grid(64, rule))
    assert (scale == 0).tolist() == [[False, True, False], [False] * 3]
    assert codes[0, 64:128].count_nonzero() == 0


@every_rule
@every_grid
def test_outliers_and_tiny_weights_stay_finite(size, rule):
    grid, normal = Grid(size, rule), torch.randn(3, 140)
    for outlier, others in product([1e38, -3e38, 1e30, 1e-30, 1e-38, -1e-45], [1, 0, 1e-38]):
        weight = normal * others
        weight[1, 5] = outlier
        codes, scale, _ = quantize(weight, grid)
        assert torch.isfinite(scale).all(), (outlier, others)
        dense = codes.float() * expand(scale, grid.columns(140), 140)
        assert torch.isfinite(dense).all(), (outlier, others)
        # No farther away than zero is; below bfloat16's smallest (9.2e-41) a scale may round to zero.
        error = (weight.double() - dequantized(weight, grid)).abs()
        assert (error <= weight.abs().double() * (1 + 2.0**-20) + 1e-40).all(), (outlier, others)


def squared_error(weight, grid):
    return float((weight - dequantized(weight, grid)).square().sum())


DISTRIBUTIONS = {
    "normal": lambda shape: torch.randn(shape),
    "uniform": lambda shape: 2 * torch.rand(shape) - 1,
    "cubed normal": lambda shape: torch.randn(shape) ** 3,
    "one-sided": lambda shape: torch.rand(shape) ** 2,
}


@every_grid
@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_mse_leaves_less_error_than_absmax_and_sigma(kind, size):
    weight = DISTRIBUTIONS[kind]((32, 256))
    error = {rule: squared_error(weight, Grid(size, rule)) for rule in RULES}
    assert error["mse"] <= error["absmax"] * (1 + BFLOAT16_ROUNDING)
    assert error["mse"] <= error["sigma"] * (1 + BFLOAT16_ROUNDING)


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_mse_is_close_to_the_best_of_a_thousand_scales(kind):
    weight = DISTRIBUTIONS[kind]((64, 64)).double()
    top = weight.abs().amax(1, keepdim=True)
    best = torch.full((64, 1), torch.inf, dtype=torch.float64)
    for clip in torch.linspace(0.2, 1.2, 500):
        for code in (LOWEST, HIGHEST):
            step = top * clip / code
            codes = (weight / step).round().clamp(LOWEST, HIGHEST)
            best = torch.minimum(best, (weight - codes * step).square().sum(1, keepdim=True))
    # 3 %: ten clipping points a side instead of five hundred; measured are 0.1 % (normal) to 2 %
    # (uniform), of which the rounding of the scale is 0.1 %.
    assert squared_error(weight.float(), Grid(64, "mse")) <= 1.03 * float(best.sum())


@every_grid
def test_weights_on_the_grid_are_kept_exactly(size):
    codes = torch.randint(LOWEST, HIGHEST + 1, (4, 192))
    codes[:, ::8], codes[:, 1::8] = LOWEST, 1  # in every group: no other codes are proportional
    exponent = -3.0 if size == "tensor" else -torch.arange(4.0).unsqueeze(1)
    weight = codes * 2.0**exponent
    assert torch.equal(dequantized(weight, Grid(size, "mse")), weight.double())
    weight = codes.clamp(min=-HIGHEST) * 2.0**exponent
    assert torch.equal(dequantized(weight, Grid(size, "absmax")), weight.double())


@pytest.mark.parametrize("clip_sigma", [0.5, 2.5, 3.0, 100.0])
@pytest.mark.parametrize("size", [8, 64, "row", "tensor"])
def test_sigma_clips_at_so_many_standard_deviations_about_zero(size, clip_sigma):
    weight, grid = torch.randn(4, 128), Grid(size, "sigma", clip_sigma)
    _, scale, _ = quantize(weight, grid)
    groups = weight.double().view(
        1 if size == "tensor" else 4, -1, 512 if size == "tensor" else grid.columns(128)
    )
    clip = torch.minimum(clip_sigma * groups.square().mean(-1).sqrt(), groups.abs().amax(-1))
    # bfloat16's rounding, and float32's of the sum.
    torch.testing.assert_close(scale.double(), clip / 7, rtol=BFLOAT16_ROUNDING + 1e-6, atol=0)


@pytest.mark.parametrize("rule", ["absmax", "sigma"])  # mse would try other candidates
@pytest.mark.parametrize(("size", "size_alone"), [(192, 64), ("row", "row"), ("tensor", "tensor")])
def test_salient_zeros_have_no_say_in_the_scale(size, size_alone, rule):
    kept, weight = torch.randn(4, 64), torch.zeros(4, 192)
    salient = torch.ones(4, 192, dtype=torch.bool)
    weight[:, ::3], salient[:, ::3] = kept, False
    codes, scale, _ = quantize(weight, Grid(size, rule), salient)
    codes_alone, scale_alone, _ = quantize(kept, Grid(size_alone, rule))
    torch.testing.assert_close(scale, scale_alone, rtol=1e-6, atol=0)  # the order of a float32 sum
    assert torch.equal(codes[:, ::3], codes_alone)
    assert codes[salient].count_nonzero() == 0


@every_rule
@pytest.mark.parametrize("size", [size for size in GROUP_SIZES if size != "tensor"])
def test_a_row_does_not_depend_on_its_neighbours(size, rule):
    weight, grid = torch.randn(5, 200), Grid(size, rule)
    codes, scale, _ = quantize(weight, grid)
    for row in range(5):
        alone, alone_scale, _ = quantize(weight[row : row + 1], grid)
        assert torch.equal(codes[row : row + 1], alone)
        assert torch.equal(scale[row : row + 1], alone_scale)


@every_rule
@every_grid
def test_the_size_of_the_working_set_does_not_change_the_result(size, rule, monkeypatch):
    weight, grid = torch.randn(7, 200), Grid(size, rule)
    salient = torch.rand(7, 200) < 0.1
    whole = quantize(weight * ~salient, grid, salient)
    monkeypatch.setattr(rounding, "WORKING_SET", 450)
    in_pieces = quantize(weight * ~salient, grid, salient)
    assert torch.equal(whole[0], in_pieces[0])
    assert torch.equal(whole[1], in_pieces[1])


@every_rule
@every_grid
def test_a_transposed_layout_gives_the_same(size, rule):
    weight, grid = torch.randn(140, 6).T, Grid(size, rule)
    one, other = quantize(weight, grid), quantize(weight.contiguous(), grid)
    assert torch.equal(one[0], other[0])
    # A float32 scale (of a row) keeps the last bit of a sum whose order follows the layout.
    torch.testing.assert_close(one[1], other[1], rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("scale", "columns", "in_features", "expanded"),
    [
        ([[1.0, 2.0], [3.0, 4.0]], 2, 4, [[1.0, 1.0, 2.0, 2.0], [3.0, 3.0, 4.0, 4.0]]),
        ([[1.0, 2.0]], 2, 3, [[1.0, 1.0, 2.0]]),
        ([[1.0], [2.0]], 8, 8, [[1.0], [2.0]]),
    ],
)
def test_expand(scale, columns, in_features, expanded):
    result = expand(torch.tensor(scale, dtype=torch.bfloat16), columns, in_features)
    assert result.dtype == torch.float32
    assert result.tolist() == expanded


@given(st.integers(0, 5000), st.integers(0, 10**6))
def test_row_blocks_cover_every_row_once_within_the_working_set(out, in_features):
    blocks = row_blocks(out, in_features)
    assert [row for block in blocks for row in range(block.start, block.stop)] == list(range(out))
    for block in blocks:
        rows = block.stop - block.start
        assert rows == 1 or rows * in_features <= rounding.WORKING_SET


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"group_size": 0}, "group_size=0"),
        ({"group_size": 4}, "group_size=4"),
        ({"group_size": -64}, "group_size=-64"),
        ({"group_size": 48}, "group_size=48"),
        ({"group_size": 96}, "group_size=96"),
        ({"group_size": 64.0}, "group_size=64.0"),
        ({"group_size": True}, "group_size=True"),
        ({"group_size": None}, "group_size=None"),
        ({"group_size": "column"}, "group_size='column'"),
        ({"scale": "best"}, "scale='best'"),
        ({"scale": None}, "scale=None"),
        ({"clip_sigma": 0}, "clip_sigma=0"),
        ({"clip_sigma": -1.0}, "clip_sigma=-1.0"),
        ({"clip_sigma": float("inf")}, "clip_sigma=inf"),
        ({"clip_sigma": float("nan")}, "clip_sigma=nan"),
        ({"clip_sigma": "3"}, "clip_sigma='3'"),
    ],
    ids=str,
)
def test_an_impossible_grid_is_refused(choices, message):
    with pytest.raises(ValueError, match=f"^{message}: must be "):
        Grid(**choices)


@pytest.mark.parametrize("size", [*GROUP_SIZES, 256, 4096])
def test_every_allowed_group_size_is_accepted(size):
    assert Grid(size).group_size == size


def test_sigma_does_not_count_the_filling_of_the_last_group():
    weight = torch.randn(8, 65)
    codes, scale, _ = quantize(weight, Grid(64, "sigma"))
    # one weight is its group's own deviation, so it is not clipped; bfloat16 rounds by 2**-9
    torch.testing.assert_close(codes[:, 64] * scale[:, 1].float(), weight[:, 64], rtol=2**-8, atol=0)


@pytest.mark.parametrize("scale", ["mse", "absmax", "sigma"])
def test_transposed_weight_is_quantized_as_its_copy(scale):
    weight = torch.randn(140, 16).T
    salient = weight.abs() > 2
    for size in (64, "row", "tensor"):
        found = quantize(weight, Grid(size, scale), salient)
        expected = quantize(weight.contiguous(), Grid(size, scale), salient.contiguous())
        # sums in another order may tip a scale's last bit, and with it a code between two levels
        torch.testing.assert_close(found[1], expected[1], rtol=2**-8, atol=0)
        assert (found[0] - expected[0]).abs().max() <= 1


@pytest.mark.parametrize("size", [8, 64, "row"])
@pytest.mark.parametrize("kind", ["normal", "uniform", "integer"])
def test_mse_is_not_worse_than_absmax_in_any_group(kind, size):
    weight = {
        "normal": torch.randn(2000, 64),
        "uniform": torch.rand(2000, 64) * 2 - 1,
        "integer": torch.randint(-7, 8, (2000, 64)).float(),
    }[kind]
    error = {}
    for rule in ("mse", "absmax"):
        codes, scale, _ = quantize(weight, Grid(size, rule))
        dense = codes * scale.float().repeat_interleave(64 // scale.shape[1], 1)
        error[rule] = (weight - dense).norm(dim=1)
    # the scale is rounded to bfloat16 after it is chosen: 2**-9 of the norm, for either rule
    assert (error["mse"] <= error["absmax"] + 2**-8 * weight.norm(dim=1)).all()


def test_every_scale_rule_has_its_function():
    assert FUNCTIONS.keys() == set(RULES)
