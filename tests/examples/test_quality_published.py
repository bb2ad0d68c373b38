"""Published roundings of the quality bench, against their formulas and bounds."""

import math
import os
import sys

import pytest
import torch
from places import EXAMPLES

sys.path.insert(0, str(EXAMPLES))
import quality_published as published  # examples are no package
from quality_peers import PEERS

ZADOR = 5 / (36 * 3**0.5) * 8 * math.pi / 256
"""Squared error of many points for normal pairs: hexagons' 0.0802 times 8 pi, over their number."""


def lost(found, weight):
    return float((found - weight).square().sum() / weight.square().sum())


def test_plain_rounding_by_hand():
    weight = torch.tensor([[0.0, 7.5, 15.0, -1.0, 14.0]])
    bits, found = published.rtn(weight, group=3)
    assert found.tolist() == [[0.0, 8.0, 15.0, -1.0, 14.0]]
    assert bits == 5 * 4 + 2 * 20


def test_sinkhorn_scales_make_rows_and_columns_alike():
    plain = torch.randn(3, 128, 64)
    column, row = 1 + 3 * torch.rand(3, 1, 64), 1 + 3 * torch.rand(3, 128, 1)
    found_column, found_row = published.sinkhorn_scales(plain * column * row)
    before = published.imbalance(*published.deviations(plain * column * row))
    after = published.imbalance(*published.deviations(plain * column * row / found_column / found_row))
    # deviations of 64 normal numbers scatter by 1 / sqrt(128) = 9 %, and the ends of 192 are 6 sigma apart
    assert float(after.max()) < 1.8 < 3 < float(before.min())


@pytest.mark.parametrize("power", [1.0, 1.4, 2.0])  # kurtosis 3, 5, 12
def test_sinq_with_nf4_levels_whatever_the_tails(power):
    weight = torch.randn(128, 256)
    weight = weight.sign() * weight.abs() ** power
    bits, found = published.sinq_nf4(weight, group=64)
    assert bits == 128 * 256 * 4 + 128 * 4 * 32 + 256 * 16
    assert lost(found, weight) < 0.13**2


def test_sinq_is_its_packages_where_that_is_right(monkeypatch):
    monkeypatch.setitem(os.environ, "SINQ_AUTO_PATCH", "0")
    reason = PEERS["sinq g64 nf4"].missing()
    if reason is not None:
        pytest.skip(reason)
    from sinq import sinqlinear as package

    layer = torch.nn.Linear(256, 128, bias=False)
    weight = torch.randn(128, 256) * (1 + torch.rand(256)) / 30  # kurtosis 3.3: its limit is 5
    layer.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
    config = package.BaseQuantizeConfig(nbits=4, group_size=64, method="sinq_nf4")
    theirs = package.SINQLinear(layer, config, compute_dtype=torch.float32, device="cpu").dequantize()
    found = published.sinq_nf4(weight, group=64)[1]
    assert lost(found, theirs.float()) < 1e-4  # scales in 16 bits, and a few ties
    assert lost(found, weight) == pytest.approx(lost(theirs, weight), rel=1e-2)


def test_grid_of_pairs_is_near_the_best_possible():
    grid = published.gaussian_grid()
    pairs = torch.randn(1 << 16, 2)
    error = float((grid[published.nearest(pairs, grid)] - pairs).square().mean())
    assert 0.98 * ZADOR < error < 1.06 * ZADOR


@pytest.mark.parametrize("width", [64, 96, 576])
def test_rotation_is_orthogonal_and_spreads(width):
    basis = published.rotation(width)
    assert torch.allclose(basis @ basis.T, torch.eye(width), atol=1e-5)
    assert float(basis.abs().max()) <= (2 / width) ** 0.5 + 1e-6


@pytest.mark.parametrize("outlier", [0.0, 30.0])
def test_higgs_loses_what_its_grid_does_on_normal_weights(outlier):
    weight = torch.randn(64, 576)
    weight[:, 7] += outlier
    bits, found = published.higgs(weight)
    assert bits == 64 * 576 * 4 + 64 * 16
    assert lost(found, weight) == pytest.approx(ZADOR, rel=0.1)
