"""Encoding of a weight by the native library where it reads it, else in plain torch; the same in its values.

Both make the same parts, but for a code in some ten thousand: their sums run in another order. So a run that
goes on must be made by the same (`MADE_BY`). Not here: the two ways themselves (`kernels.native.rounding`,
`format.encode`), and which weights are salient (`quantize.prepared`).
"""

import torch
from torch import Tensor

from svdq_hf.core import column_scale as torch_column_scale
from svdq_hf.core.normalized import NormalizedWeight
from svdq_hf.format.encode import encode, relative_error, stored_parts
from svdq_hf.format.parts import Scheme
from svdq_hf.kernels.native import rounding


def made_by() -> str:
    """What encodes weights on this machine's CPU: "native" or "torch"."""
    return "torch" if rounding.quantizing() is None else "native"


def largest(weight: Tensor) -> float:
    """The largest size of a weight `[out, in]`; NaN or an infinity where it has one."""
    if rounding.reads(weight) is None:
        return rounding.largest(weight)
    low, high = (float(end) for end in weight.aminmax())
    return max(-low, high)


def column_scale(weight: Tensor, top: float) -> Tensor:
    """The scale of each column of a weight.

    Args:
        weight: `[out, in]`, of any float dtype; finite.
        top: its largest size.

    Returns:
        `[in]`, bfloat16; see `core.column_scale`.
    """
    if rounding.reads(weight) is None:
        return rounding.column_scale(weight, top)
    return torch_column_scale.column_scale(weight.float())


def encoded(
    weight: NormalizedWeight, top: float, rows: Tensor, columns: Tensor
) -> tuple[dict[str, Tensor], float]:
    """The stored parts of a weight, and the relative error that they cost.

    Args:
        weight: the weight `[out, in]`, and the grid it is rounded on.
        top: its largest size.
        rows: row of each salient entry, `[k]`, int32, sorted as `top_positions` sorts them.
        columns: column of each salient entry, `[k]`, int32.

    Returns:
        The parts by name (`part_specs`), and `|weight - stored| / |weight|` in the Frobenius norm.
    """
    if weight.gram is None and rounding.supports(weight.dense, weight.grid) is None:
        positions = rows, columns
        found = rounding.round_weight(weight.dense, weight.grid, weight.column_scale, positions, top)
        parts = stored_parts(weight, positions, found.packed, found.scale, found.row_scale)
        return parts, found.relative_error
    parts = encode(weight, rows, columns)
    return parts, relative_error(weight.dense, parts, Scheme(grid=weight.grid))


FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of weights that are encoded as they are; others are made float32 first."""
