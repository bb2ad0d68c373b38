"""Statistics of differences: an interval, paired tests, and a band over seeds.

A GLUE dev set of 277 examples has a standard error of almost three points, so a score alone does not rank
methods. These functions know numbers only, no cells and no tables; none corrects for many tests.
"""

import math
from collections.abc import Sequence
from statistics import NormalDist, fmean, stdev
from typing import Final, Literal, NamedTuple

from svdq_hf.core.release import how_to_install

try:
    from scipy import stats
except ImportError as error:
    raise ImportError(f"the statistics need scipy: {how_to_install('evaluate')}") from error

SIGNIFICANCE: Final = 0.05
Verdict = Literal["better", "worse", "not distinguishable"]


class Interval(NamedTuple):
    """Both ends of an interval."""

    low: float
    high: float


class Band(NamedTuple):
    """A mean, and both ends of its interval."""

    mean: float
    low: float
    high: float


def wilson(right: int, n: int, level: float = 0.95) -> Interval:
    """Interval for the share of right answers (Wilson 1927, the score interval).

    Unlike `p ± z * sqrt(p (1 - p) / n)` it stays inside 0..1 and is never empty, not even at 0 of n.

    Args:
        right: number of right answers.
        n: number of answers.
        level: of confidence.

    Raises:
        ValueError: `right` is not in 0..n, or n is not positive.

    >>> low, high = wilson(5, 10)  # z = 1.96: 0.5 ± z * sqrt(0.025 + z**2 / 400) / (1 + z**2 / 10)
    >>> f"{low:.4f} {high:.4f}"
    '0.2366 0.7634'
    """
    if not 0 <= right <= n or n == 0:
        raise ValueError(f"right must lie in 0..n and n above 0, not {right} of {n}")
    z = NormalDist().inv_cdf((1 + level) / 2)
    share = right / n
    middle = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    whole = 1 + z * z / n
    # At 0 of n and n of n one end is the share itself; rounding would miss it by a unit in the last place.
    return Interval(
        min(share, max(0.0, (middle - half) / whole)), max(share, min(1.0, (middle + half) / whole))
    )


def discordant(a: str, b: str) -> tuple[int, int]:
    """Number of examples that only one side has right.

    Args:
        a: 1 or 0 for each example.
        b: the same of the other side.

    Returns:
        Examples that only `a` has right, and those that only `b` has.

    Raises:
        ValueError: `a` and `b` have different lengths.

    >>> discordant("1101", "1010")
    (2, 1)
    """
    if len(a) != len(b):
        raise ValueError(
            f"the two answered {len(a)} and {len(b)} examples: a paired test needs the same ones"
        )
    only_a = sum(x > y for x, y in zip(a, b, strict=True))
    only_b = sum(x < y for x, y in zip(a, b, strict=True))
    return only_a, only_b


def mcnemar(a: str, b: str) -> float:
    """Two-sided p of the hypothesis that both sides are right equally often (McNemar 1947).

    Exact: among the examples that only one side has right, each side is as likely as heads of a
    fair coin. 1.0 where there is none.

    Args:
        a: 1 or 0 for each example.
        b: the same of the other side, over the same examples.

    Raises:
        ValueError: see `discordant`.

    >>> mcnemar("11111", "00000")  # five of five: 2 / 2**5
    0.0625
    >>> mcnemar("1010", "1010")
    1.0
    """
    only_a, only_b = discordant(a, b)
    if only_a + only_b == 0:
        return 1.0
    return float(stats.binomtest(only_a, only_a + only_b, 0.5).pvalue)


def paired_t(a: Sequence[float], b: Sequence[float]) -> float:
    """Two-sided p of the hypothesis that two quantities have one mean (Student's paired t).

    For hundreds of examples, whose mean is close enough to normal. 1.0 where all pairs are equal.

    Args:
        a: a value for each example.
        b: the other quantity, over the same examples.

    >>> f"{paired_t([1.0, 2.0, 4.0], [0.0, 0.0, 1.0]):.4f}"  # differences 1, 2, 3: t = 2 * sqrt(3)
    '0.0742'
    """
    differences = [x - y for x, y in zip(a, b, strict=True)]
    if not any(differences):
        return 1.0
    spread = stdev(differences) / math.sqrt(len(differences))
    t = math.inf if spread == 0 else abs(fmean(differences)) / spread
    return float(2 * stats.t.sf(t, len(differences) - 1))


def verdict(p: float, a_right: float, b_right: float) -> Verdict:
    """The outcome of a paired test of `a` against `b`, in words; larger numbers are better.

    >>> verdict(0.04, 183, 170)
    'better'
    >>> verdict(0.06, 183, 170)
    'not distinguishable'
    """
    if p > SIGNIFICANCE or a_right == b_right:
        return "not distinguishable"
    return "better" if a_right > b_right else "worse"


def confidence_band(values: Sequence[float], level: float = 0.95) -> Band:
    """Mean over seeds and its t interval (Student 1908): the seeds are few, their spread unknown.

    Args:
        values: one for each seed.
        level: of confidence.

    Raises:
        ValueError: fewer than two values, of which no spread can be known.

    >>> mean, low, high = confidence_band([1.0, 2.0, 3.0])  # 2 ± 4.303 * 1 / sqrt(3)
    >>> f"{mean:.2f} {low:.3f} {high:.3f}"
    '2.00 -0.484 4.484'
    """
    if len(values) < 2:
        raise ValueError(f"an interval over seeds needs at least two of them, not {len(values)}")
    mean = fmean(values)
    quantile = float(stats.t.ppf((1 + level) / 2, len(values) - 1))
    half = quantile * stdev(values) / math.sqrt(len(values))
    return Band(mean, mean - half, mean + half)
