"""Cases in which every two values meet, instead of all products."""

from collections.abc import Sequence
from typing import Any


def pairwise(first: Sequence[Any], second: Sequence[Any], third: Sequence[Any]) -> list[tuple[Any, Any, Any]]:
    """Triples of which each pair of values from two of the lists is in at least one.

    Every value of `first` with every one of `second`; those of `third`, which must not be longer than either,
    go round with the sum of the two places.

    >>> pairwise("ab", "xy", [0, 1])
    [('a', 'x', 0), ('a', 'y', 1), ('b', 'x', 1), ('b', 'y', 0)]
    """
    if len(third) > min(len(first), len(second)):
        raise ValueError(f"third has {len(third)} values, more than one of the others; put it first")
    return [
        (one, other, third[(place + at) % len(third)])
        for place, one in enumerate(first)
        for at, other in enumerate(second)
    ]
