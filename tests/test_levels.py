import pytest
import torch

from svdq_hf import levels
from svdq_hf.grid import Grid, expand, quantize
from svdq_hf.levels import TABLES, codes, highest, nearest

every_table = pytest.mark.parametrize("name", TABLES)


@every_table
def test_sixteen_whole_numbers_in_order_with_zero_for_code_zero(name):
    table = TABLES[name]
    assert len(table) == 16
    assert sorted(set(table)) == list(table)
    assert table[8] == 0
    assert all(-128 <= level <= 127 for level in table)
    assert highest(name) == table[-1]


def test_normal_levels_are_the_means_of_what_rounds_to_them():
    weight = torch.randn(4000, 320)
    grid = Grid(32, levels="normal")
    found = quantize(weight, grid)
    step = expand(found.scale, 32, 320)
    unit, code = weight / step, found.codes.long() + 8
    share = step.square().double()
    total = torch.zeros(16, dtype=torch.float64).index_add_(0, code.flatten(), (share * unit).flatten())
    mean = total / torch.zeros(16, dtype=torch.float64).index_add_(0, code.flatten(), share.flatten())
    table = torch.tensor(TABLES["normal"], dtype=torch.float64)
    # Lloyd's condition, up to one scale for all (the scale is fitted too); the levels are whole numbers
    # and the one for zero is fixed
    size = (mean * table).sum() / table.square().sum()
    assert size == pytest.approx(1.0, abs=0.005)
    assert ((mean - table).abs() < 1.5).all()


@every_table
def test_nearest_is_the_nearest_and_codes_are_its_place(name):
    table = torch.tensor(TABLES[name], dtype=torch.float32)
    x = torch.cat([torch.randn(5000) * table[-1], torch.tensor([-1e30, 1e30, torch.inf, -torch.inf, 0.0])])
    found = nearest(x.clone(), name)
    distance = (x.clamp(-200, 200).unsqueeze(1) - table).abs()
    assert torch.equal((x.clamp(-200, 200) - found).abs(), distance.amin(1))
    assert torch.equal(table[codes(x.clone(), name).long() + 8], found)


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
