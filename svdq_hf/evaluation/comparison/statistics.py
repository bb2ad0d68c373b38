"""Estimates with intervals: means over positions, and how far they would scatter with other texts.

The paired bootstrap (Efron 1979) over blocks of neighbouring positions (Künsch 1989): blocks are drawn with
replacement, as many as there are, and the middle 95 % of the means is the interval. Both models are always
seen on the same blocks, so what makes a text hard for both cancels. Not here: tests of right answers
(`evaluation.report.statistics`).
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

RESAMPLES = 4000
"""Draws: the ends of an interval of 95 % then rest on a hundred means each."""
AT_ONCE = 250
SEED = 0
LEVEL = 0.95


class Estimate(NamedTuple):
    """A mean and both ends of its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def is_zero(self) -> bool:
        """Whether 0 lies in the interval."""
        return self.low <= 0 <= self.high

    def to_dict(self) -> dict[str, Any]:
        """The fields, in types that JSON has."""
        return self._asdict()


def estimate(values: Tensor, block: Tensor) -> Estimate:
    """The mean of values with its bootstrap interval over blocks.

    Args:
        values: `[n]`, of each position.
        block: `[n]`, int64, number of the block that it belongs to, from 0 on without gaps.

    Returns:
        The mean over all positions, and the interval; with one block only, the interval is the mean.

    >>> estimate(torch.tensor([0.0, 1.0, 1.0]), torch.tensor([0, 1, 1]))  # drawn: 0, 0; 0, 1; 1, 1
    Estimate(value=0.6666666666666666, low=0.0, high=1.0)
    """
    blocks = int(block.max()) + 1
    sums, sizes = (
        torch.zeros(blocks, dtype=torch.float64).index_add_(0, block, one.double())
        for one in (values, torch.ones_like(block))
    )
    means = torch.cat([sums[drawn].sum(1) / sizes[drawn].sum(1) for drawn in _draws(blocks)])
    low, high = torch.quantile(means, torch.tensor([1 - LEVEL, 1 + LEVEL], dtype=torch.float64) / 2).tolist()
    return Estimate(float(values.double().mean()), low, high)


def _draws(blocks: int) -> Iterator[Tensor]:
    """The numbers of the blocks in each draw, `[draws, blocks]` at a time; the same at every call."""
    generator = torch.Generator().manual_seed(SEED)
    for _ in range(RESAMPLES // AT_ONCE):
        yield torch.randint(blocks, (AT_ONCE, blocks), generator=generator)
