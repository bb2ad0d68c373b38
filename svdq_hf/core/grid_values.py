"""Allowed values of a grid: names, sizes and checks as pure data.

Without torch, so that the command line can list them quickly. Not here: what the values do (`core.grid`,
`core.scales`, `core.levels`, `core.packing`).
"""

import math
from typing import Any, Literal, get_args

GroupSize = int | Literal["row", "tensor"]
ScaleRule = Literal["mse", "absmax", "sigma"]
Levels = Literal["linear", "normal"]

BLOCK = 64
"""Codes in a block of packed bytes; a row is padded with zeros to a whole number of blocks."""

SCALE_RULES: tuple[str, ...] = get_args(ScaleRule)

LEVELS: dict[int, tuple[str, ...]] = {3: ("linear", "normal"), 4: ("linear", "normal"), 8: ("linear",)}
"""The names of the levels that codes can stand for, by bits; 8 bits have codes for all levels there are."""

ForeignLevels = Literal["iq4_nl"]
"""Levels of other formats, of 4 bits, which no config can choose."""

BITS = tuple(LEVELS)
SCALE_BITS = (16, 8)

GROUP_SIZES = f"a divisor of {BLOCK} from 8 on, a multiple of {BLOCK}, 'row' or 'tensor'"


def is_group_size(value: Any) -> bool:
    """Whether a value is a group size: groups that tile a block of 64 (or the reverse), "row" or "tensor".

    >>> [size for size in (8, 48, 64, 96, 128, "row", "column") if is_group_size(size)]
    [8, 64, 128, 'row']
    """
    if isinstance(value, str):
        return value in ("row", "tensor")
    return type(value) is int and value >= 8 and (BLOCK % value == 0 or value % BLOCK == 0)


def is_amount(value: Any) -> bool:
    """Whether a value is a finite number above 0.

    >>> is_amount(2.5), is_amount(0), is_amount(True)
    (True, False, False)
    """
    return type(value) in (int, float) and 0 < value < math.inf


def is_one_of(value: object, values: tuple[object, ...]) -> bool:
    """Whether a value is one of `values`, and of the same type: 4.0 is not 4, and True is not 1.

    >>> is_one_of(4, (3, 4)), is_one_of(4.0, (3, 4))
    (True, False)
    """
    return any(type(value) is type(one) and value == one for one in values)


def require(holds: bool, key: str, value: object, allowed: str) -> None:
    """Check one choice of the user.

    Args:
        holds: whether the value is allowed.
        key: name of the choice.
        value: what was given.
        allowed: in words, what may be given.

    Raises:
        ValueError: `holds` is False; it names key, value and what is allowed.

    >>> require(False, "k", -1, "an int from 0 on")
    Traceback (most recent call last):
    ValueError: k=-1: must be an int from 0 on
    """
    if not holds:
        raise ValueError(f"{key}={value!r}: must be {allowed}")
