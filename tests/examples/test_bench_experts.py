"""The bench of experts measures what it says."""

import sys

import pytest
from places import EXAMPLES

sys.path.insert(0, str(EXAMPLES))

import bench_experts as bench


@pytest.mark.parametrize("family", bench.FAMILIES)
def test_all_experts_of_a_tiny_model_are_quantized(family):
    cells = bench.tiny_row(family).split(" | ")
    assert cells[1] == "100%"
    assert 4.25 < float(cells[3].rstrip(" |").split(": ")[1]) < 4.3


@pytest.mark.slow
def test_quantizing_on_load_never_has_two_dense_layers():
    """In the dtype whose dense layer is the smaller one, so that the bound is the tighter one."""
    found = bench.memory("bfloat16")
    assert found["peak"] <= found["quantized"] + found["work"] + found["layer"]
