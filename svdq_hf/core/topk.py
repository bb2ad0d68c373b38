"""Top-k positions of a matrix: how many entries are kept, and which.

The positions are (row, column), sorted by row and then by column, because a slice of rows (tensor
parallelism) or a stack of matrices (fused q, k, v) then is a slice or a concatenation of positions.
Not here: what makes an entry worth keeping (`core.saliency`).
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from svdq_hf.core.rounding import row_blocks


def salient_count(k: int | float, out: int, in_features: int) -> int:
    """Number of salient entries of a matrix `[out, in]`, never more than it has.

    Args:
        k: a count, or (a float below 1) a share of `out * in`.
        out: rows.
        in_features: columns.

    >>> salient_count(256, 768, 768), salient_count(0.01, 100, 50), salient_count(256, 2, 3)
    (256, 50, 6)
    """
    numel = out * in_features
    return min(numel, round(k * numel) if isinstance(k, float) and k < 1 else int(k))


def top_positions(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Positions of the k highest scores.

    Among equal scores the first in reading order win, so the choice depends neither on the number
    of threads nor on the library's version.

    Args:
        scores: `[out, in]`.
        k: how many, at most `out * in`.

    Returns:
        Rows `[k]` and columns `[k]`, int32, sorted by row, then by column.

    Raises:
        ValueError: a score is NaN.

    >>> rows, columns = top_positions(torch.tensor([[1.0, 5.0], [5.0, 5.0]]), 2)
    >>> rows.tolist(), columns.tolist()
    ([0, 1], [1, 0])
    """
    out, in_features = scores.shape
    blocks = row_blocks(out, in_features) if scores.is_cpu else [slice(0, out)]
    return top_of_blocks(((rows, scores[rows]) for rows in blocks), in_features, k)


def top_of_blocks(blocks: Iterable[tuple[slice, Tensor]], in_features: int, k: int) -> tuple[Tensor, Tensor]:
    """`top_positions` of scores that come block by block of rows, and are not kept.

    Kept are the highest k so far, and what has come since they were last sorted out: what is below the k-th
    is never among the k highest.

    Args:
        blocks: rows, from the first to the last, and their scores `[rows, in]`.
        in_features: columns of a row.
        k: how many, at most as many as there are scores.

    Returns:
        Rows `[k]` and columns `[k]`, int32, sorted by row, then by column.

    Raises:
        ValueError: a score is NaN.
    """
    cpu = torch.device("cpu")  # and not a context's
    least, values = -math.inf, torch.empty(0, dtype=torch.float32, device=cpu)
    places = torch.empty(0, dtype=torch.int64, device=cpu)
    for rows, scores in blocks:
        flat = scores.reshape(-1)
        least = _least_of(flat, k) if least == -math.inf else least
        met, found = _at_least(flat, least)
        values = torch.cat([values.to(found.device), found])
        places = torch.cat([places.to(found.device), met + rows.start * in_features])
        if values.numel() > k + k // 4 + ROOM:
            values, places = _highest(values, places, k)
            least = float(values.min()) if k else math.inf
    _, places = _highest(values, places, k)
    return (places // in_features).int(), (places % in_features).int()


ROOM = 1 << 10
"""Scores that may wait before they are sorted out."""


def _least_of(flat: Tensor, k: int) -> float:
    """What the k-th highest of some scores `[n]` is not below: that many stretches have a maximum as high."""
    width = math.gcd(flat.numel(), STRETCH)
    while width > 1 and flat.numel() < 2 * k * width:
        width //= 2
    if not 0 < k * width <= flat.numel():
        return -math.inf
    return float(flat.view(-1, width).amax(1).topk(k, sorted=False).values.min())


def _at_least(flat: Tensor, least: float) -> tuple[Tensor, Tensor]:
    """Places and values of the scores `[n]` that are not below `least`; a NaN is none that is below.

    Most stretches have none, which their maximum tells (seven times as fast as to compare each score).
    """
    width = math.gcd(flat.numel(), STRETCH)
    stretches = flat.view(-1, width)
    near = (~(stretches.amax(1) < least)).nonzero()
    found = stretches[near.squeeze(1)]
    which, column = (~(found < least)).nonzero().unbind(1)
    return near[which, 0] * width + column, found[which, column]


STRETCH = 64
"""Scores whose maximum is looked at first."""


def _highest(values: Tensor, places: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k highest of some scores `[n]`, and their places, in the order given; the first among equals."""
    if torch.isnan(values).any():
        raise ValueError("a score is NaN: scores must be numbers, the larger the more salient")
    if k == 0:
        return values[:0], places[:0]
    threshold = values.topk(k, sorted=False).values.min()
    chosen = values > threshold
    ties = (values == threshold).nonzero().squeeze(1)
    chosen[ties[: k - int(chosen.sum())]] = True
    return values[chosen], places[chosen]
