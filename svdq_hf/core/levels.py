"""Levels: the values that codes stand for, in units of the scale (sixteen of 4 bits, eight of 3).

"linear": the code itself. "normal": the levels that lose least of normally distributed weights when each
group's scale is fitted as well (Lloyd 1982, Max 1960). They are 8-bit integers, so that a byte shuffle looks
them up and integer kernels stay exact. Code zero means zero in both, since salient weights and padding have
code zero. "iq4_nl": those of llama.cpp's type of that name, which have no zero and so are for GGUF files
alone (`integrations.gguf`); no choice of a config. Not here: which scale a group gets (`core.scales`), and
codes as bytes (`core.packing`).
"""

from functools import cache

import torch
from torch import Tensor

from svdq_hf.core.grid_values import LEVELS
from svdq_hf.core.packing import RANGES

TOP = 127
"""The largest level of a table: 8 bits with a sign."""


# Each level is the mean of what rounds to it, in groups of 32 with the scale rule "mse"; a test holds
# this. NF4's levels, quantiles instead, lose 8 % more, and those fitted to the weights of Gemma 3 are
# these to within 2.
_NORMAL: dict[int, tuple[int, ...]] = {
    3: (-127, -80, -49, -23, 0, 27, 57, 97),
    4: (-127, -99, -76, -59, -44, -32, -20, -10, 0, 12, 24, 37, 51, 68, 89, 123),
}

_IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def _table(bits: int, name: str) -> tuple[int, ...]:
    lowest, highest = RANGES[bits]
    return _NORMAL[bits] if name == "normal" else tuple(range(lowest, highest + 1))


TABLES = {bits: {name: _table(bits, name) for name in names} for bits, names in LEVELS.items()}
"""Level of each code, from the lowest on, by bits and name."""

TABLES[4]["iq4_nl"] = _IQ4_NL


def highest(levels: str, bits: int = 4) -> int:
    """The largest level of a table.

    >>> highest("linear"), highest("normal", 3)
    (7, 97)
    """
    return TABLES[bits][levels][-1]


def nearest(x: Tensor, levels: str, bits: int = 4) -> Tensor:
    """The level nearest to each number.

    Args:
        x: `[...]` of any shape, float32, in units of the scale; overwritten.
        levels: name of the table.
        bits: of a code.

    Returns:
        Levels `[...]` of the same shape, float32.

    >>> nearest(torch.tensor([0.4, -3.6, 99.0]), "linear").tolist()
    [0.0, -4.0, 7.0]
    >>> nearest(torch.tensor([0.4, -3.6, 99.0]), "normal").tolist()
    [0.0, 0.0, 89.0]
    """
    if levels == "linear":
        return x.round_().clamp_(*RANGES[bits])
    return _look_up(x, _cells(levels, bits, x.device))


def codes(x: Tensor, levels: str, bits: int = 4) -> Tensor:
    """The code of the level nearest to each number.

    Args:
        x: `[...]` of any shape, float32, in units of the scale; overwritten.
        levels: name of the table.
        bits: of a code.

    Returns:
        Codes `[...]` of the same shape, int8.

    >>> codes(torch.tensor([0.4, -3.6, 99.0]), "normal").tolist()
    [0, 0, 6]
    """
    if levels == "linear":
        return x.round_().clamp_(*RANGES[bits]).to(torch.int8)
    return _look_up(x, _cells(levels, bits, x.device, codes=True))


LOOK_UP_CELLS = 4 * TOP
"""Half steps from -TOP to TOP: levels are whole numbers, so what lies between two changes at a half."""


@cache
def _cells(levels: str, bits: int, device: torch.device, codes: bool = False) -> Tensor:
    """Table from half steps `[LOOK_UP_CELLS]` to the nearest level, or its code; a tie goes up."""
    cpu = torch.device("cpu")  # whatever the caller's default device and dtype are: this is kept
    table = torch.tensor(TABLES[bits][levels], dtype=torch.float32, device=cpu)
    middles = (table[1:] + table[:-1]) / 2
    left = torch.arange(LOOK_UP_CELLS, dtype=torch.float32, device=cpu) / 2 - TOP
    index = torch.bucketize(left, middles, right=True)
    found = (index + RANGES[bits][0]).to(torch.int8) if codes else table[index]
    return found.to(device)  # once for each device: a copy to a GPU waits for it


def _look_up(x: Tensor, cells: Tensor) -> Tensor:
    place = x.add_(TOP).mul_(2).clamp_(0, LOOK_UP_CELLS - 1).int()
    return cells.index_select(0, place.view(-1)).view(x.shape)
