"""The product of whole numbers: equal, digit for digit, to one in integers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from svdq_hf.core.activations import round_tokens
from svdq_hf.core.grid import Grid
from svdq_hf.core.packing import unpack
from svdq_hf.format.encode import decompose
from svdq_hf.format.parts import SUBSPACE_SCHEME, Scheme
from svdq_hf.kernels.integer_product import multiply, whole_weight

GRIDS = {
    "normal": Grid(32, levels="normal", scale_bits=8),
    "linear": Grid(64, levels="linear", scale_bits=8),
    "three bits": Grid(32, levels="normal", scale_bits=8, bits=3),
    "rows": Grid("row", levels="normal"),
    "matrix": Grid("tensor"),
    "subspace": SUBSPACE_SCHEME.grid,
}
every_grid = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)


def stored(grid, out, in_features, generator):
    weight = torch.randn(out, in_features, generator=generator)
    none = torch.empty(0, dtype=torch.int32)
    return decompose(weight, none, none, Scheme(0, grid))


def in_integers(tokens, parts, group):
    """The same product in int64, by the format's text; then the scales, in the kernel's order."""
    in_features = tokens.codes.shape[1]
    codes = unpack(parts["weight"], in_features).long()
    if "levels" in parts:
        codes = parts["levels"].long()[codes + len(parts["levels"]) // 2]
    scale, unit = parts["weight_scale"], parts.get("row_scale")
    if unit is not None:
        codes = codes * scale.long().repeat_interleave(group, 1)[:, :in_features]
    real = (scale.flatten() if unit is None else unit).double()
    whole = (tokens.codes.long() - tokens.zero.long())[:, None, :] * codes[None]
    return whole.sum(-1).double() * real * tokens.scale


@every_grid
@given(st.integers(0, 2**32 - 1), st.integers(1, 200), st.sampled_from([4, 8]))
def test_the_product_is_that_of_integers_digit_for_digit(grid, seed, in_features, bits):
    generator = torch.Generator().manual_seed(seed)
    parts = stored(grid, 5, in_features, generator)
    tokens = round_tokens(torch.randn(3, in_features, generator=generator), bits)
    group = grid.columns(in_features)
    assert torch.equal(multiply(tokens, parts, group), in_integers(tokens, parts, group))


def test_rows_in_blocks_are_all_there(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    parts, tokens = stored(GRIDS["normal"], 40, 96, generator), round_tokens(torch.randn(2, 96), 4)
    expected = multiply(tokens, parts, 32)
    monkeypatch.setattr("svdq_hf.core.rounding.WORKING_SET", 1024)
    assert len(list(whole_weight(parts, 96, 32))) > 2
    assert torch.equal(multiply(tokens, parts, 32), expected)


@every_grid
def test_a_weight_is_whole_numbers_times_units(grid):
    parts = stored(grid, 5, 96, torch.Generator().manual_seed(0))
    for _, whole, unit in whole_weight(parts, 96, grid.columns(96)):
        assert torch.equal(whole, whole.round())
        assert unit.shape[0] in (1, whole.shape[0])
