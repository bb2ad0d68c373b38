"""What each value of a grid may be: pure data, so that a command line can tell it without importing torch.

Not here: what the values do (`grid`, `scales`, `levels`, `packing`).
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

BITS = tuple(LEVELS)
SCALE_BITS = (16, 8)

GROUP_SIZES = f"a divisor of {BLOCK} from 8 on, a multiple of {BLOCK}, 'row' or 'tensor'"


def is_group_size(value: Any) -> bool:
    """Whether groups of so many columns fill whole blocks, or a block whole groups; or it is a word for more.

    >>> [size for size in (8, 48, 64, 96, 128, "row", "column") if is_group_size(size)]
    [8, 64, 128, 'row']
    """
    if isinstance(value, str):
        return value in ("row", "tensor")
    return type(value) is int and value >= 8 and (BLOCK % value == 0 or value % BLOCK == 0)


def is_amount(value: Any) -> bool:
    """Whether it is a number above 0, and finite.

    >>> is_amount(2.5), is_amount(0), is_amount(True)
    (True, False, False)
    """
    return type(value) in (int, float) and 0 < value < math.inf


def is_one_of(value: object, values: tuple[object, ...]) -> bool:
    """Whether it is one of them in type as well: 4.0 is not 4, and True is not 1.

    >>> is_one_of(4, (3, 4)), is_one_of(4.0, (3, 4))
    (True, False)
    """
    return any(type(value) is type(one) and value == one for one in values)


def require(holds: bool, key: str, value: object, allowed: str) -> None:
    """Raise the error of a choice unless it holds.

    >>> require(False, "k", -1, "an int from 0 on")
    Traceback (most recent call last):
    ValueError: k=-1: must be an int from 0 on
    """
    if not holds:
        raise ValueError(f"{key}={value!r}: must be {allowed}")
