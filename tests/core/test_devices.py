"""A weight is rounded on its own device without a wait: the meta device, which has no data, can do it."""

import pytest
import torch

from svdq_hf.core.column_scale import column_scale
from svdq_hf.core.grid import Grid
from svdq_hf.core.packing import pack
from svdq_hf.core.rounding import ON_DEVICE, WORKING_SET, quantize, row_blocks

GRIDS = [
    Grid(),
    Grid(group_size=32, levels="normal", scale_bits=8),
    Grid(group_size="row", scale="sigma"),
    Grid(group_size="tensor", levels="normal"),
    Grid(bits=3, group_size=8, levels="normal"),
    Grid(bits=8, scale="absmax"),
]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_rounding_and_packing_look_at_no_data(grid):
    weight = torch.empty(70, 130, device="meta")
    found = quantize(weight, grid)
    packed = pack(found.codes, grid.bits)
    scales = column_scale(weight)
    assert {one.device.type for one in (found.codes, found.scale, packed, scales)} == {"meta"}
    assert found.scale.shape == grid.scale_shape(70, 130)


def test_pieces_are_larger_where_starting_a_kernel_costs_more():
    assert len(row_blocks(4096, 4096)) == 4096 * 4096 // WORKING_SET
    assert len(row_blocks(4096, 4096, torch.device("cpu"))) == 4096 * 4096 // WORKING_SET
    assert len(row_blocks(4096, 4096, torch.device("cuda"))) == 4096 * 4096 // ON_DEVICE
