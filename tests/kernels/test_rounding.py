"""Native quantizing: against plain torch over the grids, its paths and threads, bad input, its absence."""

import os
import shutil
import subprocess
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from svdq_hf.core.column_scale import column_scale
from svdq_hf.core.grid import Grid
from svdq_hf.core.grid_values import LEVELS
from svdq_hf.core.normalized import NormalizedWeight
from svdq_hf.core.packing import unpack
from svdq_hf.core.topk import top_positions
from svdq_hf.format.encode import encode, relative_error
from svdq_hf.format.parts import Scheme
from svdq_hf.kernels.native import library, rounding

HERE = Path(__file__).parent
SOURCE = Path(rounding.__file__).parent
KINDS = [(bits, levels) for bits, names in LEVELS.items() for levels in names]
LAYOUTS = [
    {"group_size": group, "scale_bits": scale_bits, "column_scale": column}
    for group, scale_bits, column in product((8, 32, 64, 128, "row"), (8, 16), (False, True))
]
DEFAULT = {"group_size": 32, "levels": "normal", "column_scale": True, "scale_bits": 8}
DTYPES = list(rounding.KINDS)
PATHS = range(min(library.best_path(), library.AVX2) + 1)
pytestmark = pytest.mark.skipif(
    rounding.quantizing() is None, reason="no C compiler built the native library"
)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def natively(weight, grid, positions, path=None):
    top = rounding.largest(weight, path)
    scale = rounding.column_scale(weight, top, path) if grid.column_scale else None
    return rounding.round_weight(weight, grid, scale, positions, top, path)


def in_torch(weight, grid, positions):
    """The stored parts of a weight, and its relative error."""
    parts = encode(NormalizedWeight(weight.float(), grid), *positions)
    return parts, relative_error(weight, parts, Scheme(grid=grid))


def outliers(weight, k=50):
    return top_positions(weight.float().abs(), min(k, weight.numel()))


def different(weight, grid):
    """How many codes the two ways disagree in, and by how much in the relative error."""
    positions = outliers(weight)
    parts, error = in_torch(weight, grid, positions)
    found = natively(weight, grid, positions)
    assert found.scale.dtype == parts["weight_scale"].dtype
    assert found.scale.shape == parts["weight_scale"].shape
    torch.testing.assert_close(found.scale.float(), parts["weight_scale"].float(), atol=1.01, rtol=0.01)
    codes = [unpack(packed, weight.shape[1]) for packed in (found.packed, parts["weight"])]
    return int((codes[0] != codes[1]).sum()), abs(found.relative_error - error) / error


@pytest.mark.parametrize(("bits", "levels"), KINDS)
def test_fewer_than_one_code_in_ten_thousand_differs_from_plain_torch(bits, levels):
    codes = wrong = 0
    for layout, dtype in zip(LAYOUTS, DTYPES * len(LAYOUTS), strict=False):
        weight = torch.randn(100, 1000).to(dtype)
        count, off = different(weight, Grid(bits=bits, levels=levels, **layout))
        wrong, codes = wrong + count, codes + weight.numel()
        assert off < 1e-4, layout
    assert wrong < 1e-4 * codes


@pytest.mark.parametrize("rule", ["absmax", "sigma", "mse"])
@pytest.mark.parametrize("shape", [(1, 1), (7, 65), (9, 128), (65, 1001)], ids=str)
def test_each_rule_and_each_shape_gives_what_plain_torch_gives(rule, shape):
    weight = torch.randn(shape) * torch.randn(shape[1]).exp()
    for choices in (DEFAULT, {"bits": 3}, {"bits": 8, "group_size": "row"}):
        grid = Grid(**choices, scale=rule)
        positions = outliers(weight, 9)
        parts, _ = in_torch(weight, grid, positions)
        found = natively(weight, grid, positions)
        if weight.numel() > len(positions[0]):
            assert (unpack(found.packed, shape[1]) != unpack(parts["weight"], shape[1])).sum() <= 1
        assert found.packed.shape == parts["weight"].shape


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "choices", [DEFAULT, {}, {"bits": 3, "scale": "sigma"}, {"group_size": "row"}], ids=str
)
def test_every_path_and_number_of_threads_gives_the_same_bytes(choices, dtype, threads):
    weight, grid = (torch.randn(133, 700) * torch.randn(700).exp()).to(dtype), Grid(**choices)
    positions = outliers(weight)
    found = []
    for path, number in product(PATHS, (1, 2, 5)):
        threads(number)
        found.append(natively(weight, grid, positions, path))
    for one in found[1:]:
        assert torch.equal(one.packed, found[0].packed)
        assert torch.equal(one.scale, found[0].scale)
        assert one.relative_error == found[0].relative_error
        assert (one.row_scale is None) or torch.equal(one.row_scale, found[0].row_scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_the_largest_size_is_found_and_shows_a_nan_or_an_infinity(dtype, path):
    weight = torch.randn(33, 129).to(dtype)
    assert rounding.largest(weight, path) == float(weight.abs().max())
    for value in (torch.nan, torch.inf, -torch.inf):
        damaged = weight.clone()
        damaged[17, 128] = value
        assert not torch.isfinite(torch.tensor(rounding.largest(damaged, path)))


@given(st.integers(1, 40), st.integers(1, 90), st.sampled_from(DTYPES), st.integers(0, 2**31))
def test_column_scales_are_those_of_plain_torch_to_a_unit_of_bfloat16(out, columns, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    size = torch.randn(columns, generator=generator).exp()
    weight = (torch.randn(out, columns, generator=generator) * size).to(dtype)
    found = rounding.column_scale(weight, rounding.largest(weight))
    torch.testing.assert_close(found.float(), column_scale(weight.float()).float(), rtol=2**-7, atol=0)


@pytest.mark.parametrize("top", [2.0**-110, 1.0, 2.0**123], ids=lambda top: f"{top:.0e}")
def test_the_ends_of_float32_and_zeros_are_rounded_as_in_plain_torch(top):
    weight = torch.randn(16, 96)
    weight[3], weight[:, 40], weight[5, :32] = 0, 0, 0
    weight *= top / weight.abs().max()
    for choices in (DEFAULT, {"group_size": 64}):
        count, off = different(weight, Grid(**choices))
        assert count <= 2
        assert off < 1e-4


def test_a_weight_of_zeros_costs_nothing_and_is_all_zero():
    nowhere = torch.empty(0, dtype=torch.int32)
    for choices in (DEFAULT, {}, {"bits": 8}):
        found = natively(torch.zeros(9, 70), Grid(**choices), (nowhere, nowhere))
        assert found.relative_error == 0
        assert not unpack(found.packed, 70).any()


def test_a_weight_all_of_whose_entries_are_salient_leaves_codes_of_zero():
    weight = torch.randn(9, 70)
    found = natively(weight, Grid(**DEFAULT), outliers(weight, weight.numel()))
    assert found.relative_error == 0
    assert not unpack(found.packed, 70).any()


@pytest.mark.parametrize(
    ("rows", "columns"),
    [([0, 0], [3, 3]), ([1, 0], [0, 0]), ([4], [0]), ([0], [70]), ([-1], [0]), ([0], [-1])],
)
def test_positions_out_of_range_or_order_are_refused(rows, columns):
    positions = torch.tensor(rows, dtype=torch.int32), torch.tensor(columns, dtype=torch.int32)
    with pytest.raises(ValueError, match="out of range or out of order"):
        natively(torch.randn(4, 70), Grid(), positions)


def test_what_is_not_supported_says_why(monkeypatch):
    weight = torch.randn(8, 70)
    assert rounding.supports(weight, Grid()) is None
    assert "whole matrix" in (rounding.supports(weight, Grid(group_size="tensor")) or "")
    assert "float64" in (rounding.supports(weight.double(), Grid()) or "")
    assert "strided" in (rounding.reads(weight.T) or "")
    assert "meta" in (rounding.reads(weight.to("meta")) or "")
    monkeypatch.setattr(library, "library", lambda: None)
    rounding.quantizing.cache_clear()
    try:
        assert "not built" in (rounding.supports(weight, Grid()) or "")
    finally:
        rounding.quantizing.cache_clear()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc, whose sanitizers this needs")
def test_sanitizers_see_no_byte_beyond_a_buffer_and_nothing_undefined(tmp_path):
    program = tmp_path / "check"
    flags = ["-g", "-O1", "-std=gnu11", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    built = subprocess.run(
        ["gcc", *flags, f"-I{SOURCE}", str(HERE / "check_quantize.c"), "-lm", "-o", str(program)],
        capture_output=True,
        text=True,
    )
    if "cannot find" in built.stderr:
        pytest.skip("gcc has no sanitizers here")
    assert built.returncode == 0, built.stderr
    environment = {**os.environ, "LD_PRELOAD": ""}
    done = subprocess.run([str(program)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout) == 180 * len(PATHS)
