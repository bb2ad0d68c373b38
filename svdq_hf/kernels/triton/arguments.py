"""Arguments of the Triton kernels, in tuples by what they are of: weight, salient entries, tokens, sizes.

Triton takes named tuples apart, so a kernel's signature stays readable; a field that is None is compiled
away. Not here: where the values come from (`kernels.triton.launch`).
"""

from typing import Any, NamedTuple


class Weight(NamedTuple):
    """Pointers to the stored parts `[experts * out, ...]`; None: absent. table: levels, four to an int32."""

    codes: Any
    scale: Any
    row_scale: Any = None
    column_scale: Any = None
    table: Any = None
    bias: Any = None


class Salient(NamedTuple):
    """Pointers to the salient entries `[experts * k]`, sorted by row; None: there are none."""

    value: Any = None
    row: Any = None
    column: Any = None


class Tokens(NamedTuple):
    """Pointers to x `[tokens, in]`, to y `[tokens, out]`, to partial sums `[splits, tokens, out]`, and to
    where each expert's tokens end, `[experts]`.
    """

    x: Any
    y: Any
    sums: Any = None
    ends: Any = None


class Sizes(NamedTuple):
    """Numbers of a call. k: salient entries of a matrix."""

    tokens: int
    out: int
    in_features: int
    k: int
    experts: int = 1


class Window(NamedTuple):
    """Rows and columns of a weight that are wanted."""

    row: int
    rows: int
    column: int
    columns: int


class Plan(NamedTuple):
    """What a kernel is compiled for: the stored layout and the shape of a program's tile.

    group: columns that share a scale, 0: all. single: one scale for a whole matrix. experts: a power of two.
    """

    bits: int
    group: int
    single: bool
    tokens: int
    rows: int
    blocks: int = 1
    splits: int = 1
    terms: int = 1
    operand: Any = None
    experts: int = 1
