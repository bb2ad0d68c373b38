"""Trellis codes of the quality bench: Viterbi's search against all strings, and the error on normal rows."""

import itertools
import sys

import pytest
import torch
from places import EXAMPLES

sys.path.insert(0, str(EXAMPLES))
import quality_trellis as coded  # examples are no package


def test_values_are_nearly_normal():
    values = coded.computed_values(16)
    assert float(values.mean()) == pytest.approx(0, abs=0.01)
    assert float((values**4).mean()) == pytest.approx(3, abs=0.2)
    assert 3 < float(values.abs().max()) < 4.5


def test_windows_are_a_string_of_bits():
    found = coded.viterbi(torch.randn(4, 20), coded.computed_values(8))
    assert torch.equal(found[:, 1:] >> 4, found[:, :-1] & 15)


def test_the_string_is_the_best_of_all():
    values, row = coded.computed_values(8), torch.tensor([0.3, -1.7, 0.9])
    found = values[coded.viterbi(row[None], values)][0]
    string = torch.tensor(list(itertools.product(range(256), range(16), range(16))))
    second = (string[:, 0] & 15) << 4 | string[:, 1]
    third = string[:, 1] << 4 | string[:, 2]
    every = values[torch.stack([string[:, 0], second, third], 1)]
    assert float((found - row).square().sum()) == pytest.approx(float((every - row).square().sum(1).min()))


@pytest.mark.parametrize(("window", "most"), [(8, 0.014), (12, 0.0060)])
def test_a_longer_window_loses_less(window, most):
    """4 bits for a normal number lose at least 2**-8; the best 16 levels for one at a time lose 0.0095."""
    weight = torch.randn(32, 256)
    bits, found = coded.trellis(weight, window)
    assert bits == 32 * (256 * 4 + window - 4 + 16)
    assert 2**-8 < float((found - weight).square().mean()) < most
