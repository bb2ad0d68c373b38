from typing import get_args

import gguf
import pytest
import torch

from svdq_hf import SVDQConfig
from svdq_hf.core import levels
from svdq_hf.core.grid import Grid
from svdq_hf.core.grid_values import LEVELS, ForeignLevels
from svdq_hf.core.levels import TABLES, codes, highest, nearest
from svdq_hf.core.packing import RANGES
from svdq_hf.core.rounding import expand, quantize

ALL = [(bits, name) for bits, tables in TABLES.items() for name in tables]
WITHOUT_ZERO = {"iq4_nl": 1}
"""What code zero means there: llama.cpp's levels, which none of our files hold."""
every_table = pytest.mark.parametrize(("bits", "name"), ALL)


def test_3_and_4_bits_have_two_tables_each_and_8_bits_one():
    chosen = [one for one in ALL if one[1] not in WITHOUT_ZERO]
    assert chosen == [(bits, name) for bits, names in LEVELS.items() for name in names]
    assert chosen == [(3, "linear"), (3, "normal"), (4, "linear"), (4, "normal"), (8, "linear")]


def test_levels_of_other_formats_are_no_choice():
    assert (
        set(get_args(ForeignLevels))
        == WITHOUT_ZERO.keys()
        == {name for _, name in ALL} - {"linear", "normal"}
    )
    for name in WITHOUT_ZERO:
        with pytest.raises(ValueError, match=f"levels='{name}': must be one of"):
            SVDQConfig(levels=name)


def test_iq4_nl_is_that_of_ggml():
    assert TABLES[4]["iq4_nl"] == tuple(gguf.quants.IQ4_NL.kvalues)


@every_table
def test_whole_numbers_in_order_with_zero_for_code_zero(bits, name):
    table, (lowest, highest_code) = TABLES[bits][name], RANGES[bits]
    assert len(table) == highest_code - lowest + 1 == (255 if bits == 8 else 2**bits)
    assert sorted(set(table)) == list(table)
    assert table[-lowest] == WITHOUT_ZERO.get(name, 0)
    assert all(-128 <= level <= 127 for level in table)
    assert highest(name, bits) == table[-1]


@pytest.mark.parametrize("bits", [3, 4])
def test_normal_levels_are_the_means_of_what_rounds_to_them(bits):
    weight = torch.randn(4000, 320)
    grid = Grid(32, levels="normal", bits=bits)
    found = quantize(weight, grid)
    step = expand(found.scale, 32, 320)
    unit, code = weight / step, found.codes.flatten().long() - RANGES[bits][0]
    share = step.square().double()
    total = torch.zeros(2**bits, dtype=torch.float64).index_add_(0, code, (share * unit).flatten())
    mean = total / torch.zeros(2**bits, dtype=torch.float64).index_add_(0, code, share.flatten())
    table = torch.tensor(TABLES[bits]["normal"], dtype=torch.float64)
    # Lloyd's condition, up to one scale for all (the scale is fitted too); the levels are whole numbers
    # and the one for zero is fixed
    size = (mean * table).sum() / table.square().sum()
    assert size == pytest.approx(1.0, abs=0.005)
    assert ((mean - table).abs() < 1.5).all()


@every_table
def test_nearest_is_the_nearest_and_codes_are_its_place(bits, name):
    table = torch.tensor(TABLES[bits][name], dtype=torch.float32)
    x = torch.cat([torch.randn(5000) * table[-1], torch.tensor([-1e30, 1e30, torch.inf, -torch.inf, 0.0])])
    found = nearest(x.clone(), name, bits)
    distance = (x.clamp(-200, 200).unsqueeze(1) - table).abs()
    assert torch.equal((x.clamp(-200, 200) - found).abs(), distance.amin(1))
    assert torch.equal(table[codes(x.clone(), name, bits).long() - RANGES[bits][0]], found)


def test_a_tie_goes_up_or_to_the_even_code():
    assert nearest(torch.tensor([6.0, -5.0, 18.0]), "normal").tolist() == [12.0, 0.0, 24.0]
    assert nearest(torch.tensor([0.5, 1.5, -0.5]), "linear").tolist() == [0.0, 2.0, 0.0]


@pytest.mark.parametrize("setting", ["dtype", "device"])
def test_defaults_of_the_process_play_no_part(setting, monkeypatch):
    expected = nearest(torch.linspace(-140, 140, 999), "normal")
    levels._cells.cache_clear()
    try:
        if setting == "dtype":
            torch.set_default_dtype(torch.bfloat16)
            nearest(torch.zeros(1, dtype=torch.float32), "normal")
        else:
            with torch.device("meta"):
                nearest(torch.zeros(1, dtype=torch.float32, device="cpu"), "normal")
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(nearest(torch.linspace(-140, 140, 999), "normal"), expected)
