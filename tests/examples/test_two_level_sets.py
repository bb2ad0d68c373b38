"""Two sets of levels: what a group takes by hand, and what training them gains on normal groups."""

import sys

import pytest
import torch
from places import EXAMPLES

sys.path.insert(0, str(EXAMPLES))
import two_level_sets as two  # examples are no package

EVEN = torch.arange(-8, 8) / 8


def test_a_group_takes_the_set_that_holds_it():
    squares = EVEN.sign() * EVEN**2
    groups = torch.stack([-EVEN, 3 * squares])  # the first by its sign alone
    found = two.assign(groups, [squares, EVEN], (1, -1))
    assert found.which.tolist() == [1, 0]
    assert found.scale.sign().tolist() == [-1, 1]
    assert found.error.tolist() == pytest.approx([0, 0], abs=1e-3)


def test_training_two_sets_gains_little_on_normal_groups():
    seen, other = torch.randn(2, 400, two.GROUP)
    sets = two.trained(seen, [two.NORMAL, 0.6 * two.NORMAL + 0.4 * EVEN], (1, -1), rounds=2)
    assert all(float(levels.abs().min()) == 0 for levels in sets)
    gain = two.lost(other, sets, (1, -1)) / two.lost(other, [two.NORMAL], (1, -1))
    assert 0.88 < gain < 0.97


def test_nothing_to_try_is_an_error():
    with pytest.raises(ValueError, match="give at least one of each"):
        two.assign(torch.ones(1, two.GROUP), [], (1,))
