import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from svdq_hf.evaluation.report.statistics import (
    confidence_band,
    discordant,
    mcnemar,
    paired_t,
    verdict,
    wilson,
)

COUNTS = st.integers(1, 6000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))
# Two pairs of strings that agree where they agree: (1, 1), (0, 0), (1, 0), (0, 1).
ANSWERS = st.lists(st.sampled_from(["11", "00", "10", "01"]), max_size=60)


@given(counts=COUNTS, level=st.sampled_from([0.5, 0.9, 0.95, 0.99]))
def test_wilson_is_scipys(counts, level):
    right, n = counts
    theirs = stats.binomtest(right, n).proportion_ci(confidence_level=level, method="wilson")
    # both are a few operations in float64
    assert wilson(right, n, level) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


@given(counts=COUNTS)
def test_wilson_holds_the_share_and_stays_within_zero_and_one(counts):
    right, n = counts
    low, high = wilson(right, n)
    assert 0 <= low <= right / n <= high <= 1
    assert low < high


def test_wilson_mirrors():
    low, high = wilson(3, 20)
    assert wilson(17, 20) == pytest.approx((1 - high, 1 - low))


@pytest.mark.parametrize(("right", "n"), [(-1, 5), (6, 5), (0, 0)])
def test_wilson_refuses_what_no_test_can_give(right, n):
    with pytest.raises(ValueError, match=f"not {right} of {n}"):
        wilson(right, n)


@given(answers=ANSWERS)
def test_mcnemar_is_a_fair_coin_counted_by_hand(answers):
    a, b = "".join(pair[0] for pair in answers), "".join(pair[1] for pair in answers)
    only_a, only_b = answers.count("10"), answers.count("01")
    flips = only_a + only_b
    tail = sum(math.comb(flips, heads) for heads in range(min(only_a, only_b) + 1)) / 2**flips
    assert discordant(a, b) == (only_a, only_b)
    assert mcnemar(a, b) == pytest.approx(min(1.0, 2 * tail), rel=1e-9)
    assert mcnemar(a, b) == mcnemar(b, a)


@pytest.mark.parametrize(
    ("a", "b", "p"),
    [
        ("111111", "000000", 2 / 64),
        ("1111110", "0000001", 2 * (1 + 7) / 128),
        ("10", "01", 1.0),
        ("1100", "1100", 1.0),
        ("", "", 1.0),
    ],
)
def test_mcnemar_by_hand(a, b, p):
    assert mcnemar(a, b) == pytest.approx(p)


def test_mcnemar_refuses_other_examples():
    with pytest.raises(ValueError, match="answered 2 and 3 examples"):
        mcnemar("10", "101")


@pytest.mark.parametrize(
    ("p", "a", "b", "words"),
    [
        (0.04, 9, 3, "better"),
        (0.04, 3, 9, "worse"),
        (0.05, 9, 3, "better"),
        (0.0501, 9, 3, "not distinguishable"),
        (1.0, 5, 5, "not distinguishable"),
    ],
)
def test_verdict(p, a, b, words):
    assert verdict(p, a, b) == words


@given(values=st.lists(st.floats(-100, 100), min_size=2, max_size=9))
def test_band_over_seeds_is_scipys(values):
    mean, low, high = confidence_band(values)
    assert low <= mean <= high
    spread = stats.sem(values)
    if spread > 1e-9:  # scipy returns nan where all values are the same
        theirs = stats.t.interval(0.95, len(values) - 1, loc=mean, scale=spread)
        assert (low, high) == pytest.approx(theirs, rel=1e-9, abs=1e-9)


def test_band_of_one_seed_is_refused():
    with pytest.raises(ValueError, match="at least two"):
        confidence_band([0.5])


def test_paired_t_against_the_textbook():
    # Student's own ten patients (1908): the gain in sleep of two drugs, t = 4.0621 with 9 degrees
    first = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    second = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    assert paired_t(first, second) == pytest.approx(0.002833, abs=1e-6)
    assert paired_t(first, first) == 1.0
    assert paired_t([1.0, 2.0], [0.0, 1.0]) == 0.0  # the same difference every time
