"""The bootstrap: its interval where it is known exactly, and what it does not depend on."""

from math import sqrt

import pytest
import torch
from scipy import stats

from svdq_hf.evaluation.comparison.statistics import Estimate, estimate


def test_interval_of_a_share_is_the_binomial_quantiles():
    """Blocks of one position, 40 of 100 right: a draw's number of right ones is binomial(100, 0.4)."""
    values = torch.cat([torch.ones(40), torch.zeros(60)])
    found = estimate(values, torch.arange(100))
    low, high = stats.binom.ppf([0.025, 0.975], 100, 0.4) / 100
    assert found.value == pytest.approx(0.4)
    assert found.low == pytest.approx(low, abs=0.0101)  # one more or less: 4000 draws, not all
    assert found.high == pytest.approx(high, abs=0.0101)


def test_interval_of_many_positions_is_that_of_a_mean():
    values = torch.randn(2000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = estimate(values, torch.arange(2000))
    half = 1.96 * float(values.std()) / sqrt(2000)
    assert found.high - found.value == pytest.approx(half, rel=0.1)
    assert found.value - found.low == pytest.approx(half, rel=0.1)


def test_two_blocks_have_both_of_their_means_as_ends():
    """Of the draws 0 0, 0 1, 1 0, 1 1 each is a quarter, more than 2.5 %."""
    values, block = torch.tensor([1.0, 3.0, 10.0]), torch.tensor([0, 0, 1])
    assert estimate(values, block) == Estimate(14 / 3, 2.0, 10.0)


def test_neighbours_that_are_alike_widen_the_interval():
    values = torch.randn(50, generator=torch.Generator().manual_seed(2)).repeat_interleave(8)
    alone, together = estimate(values, torch.arange(400)), estimate(values, torch.arange(400) // 8)
    assert together.high - together.low > 2 * (alone.high - alone.low)


def test_equal_values_and_a_single_block_have_no_width():
    assert estimate(torch.zeros(9), torch.arange(9)) == Estimate(0, 0, 0)
    assert estimate(torch.tensor([1.0, 2.0]), torch.tensor([0, 0])) == Estimate(1.5, 1.5, 1.5)


def test_the_same_values_have_the_same_interval_at_every_call():
    values, block = torch.randn(64), torch.arange(64)
    assert estimate(values, block) == estimate(values, block)


@pytest.mark.parametrize(("low", "high", "zero"), [(-1, 1, True), (0, 1, True), (0.1, 1, False)])
def test_whether_zero_is_inside(low, high, zero):
    assert Estimate(0.5, low, high).is_zero is zero
