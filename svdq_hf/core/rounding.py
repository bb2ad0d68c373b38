"""Rounding of a weight `[out, in]` to codes and scales, each weight to its nearest level.

In blocks of rows that fit a core's cache. Not here: error feedback (`core.error_feedback`), and how codes are
stored (`core.packing`).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from svdq_hf.core.grid import Grid
from svdq_hf.core.levels import codes
from svdq_hf.core.scales import fit

WORKING_SET = 1 << 18
"""Weights handled at a time: a megabyte of float32, so that temporaries stay in a core's cache."""

ON_DEVICE = 1 << 24
"""The same on a GPU, where starting a kernel costs more than a megabyte's work: 64 MiB of float32."""


class Quantized(NamedTuple):
    """A rounded weight: codes `[out, in]`, int8; scales `[out, groups]`; scales of rows `[out]` or None.

    Attributes:
        codes: `[out, in]`, int8.
        scale: of `grid.scale_shape` and `grid.scale_dtype`.
        row_scale: `[out]`, bfloat16, the unit of int8 scales; None where the grid has none.
    """

    codes: Tensor
    scale: Tensor
    row_scale: Tensor | None


def quantize(weight: Tensor, grid: Grid, salient: Tensor | None = None) -> Quantized:
    """Round a weight to the nearest levels. A group of zeros gets scale zero.

    Args:
        weight: `[out, in]`, float32; its column scale has been taken out, and salient entries are zero.
        grid: layout of the scales, and the rule that fits them.
        salient: bool `[out, in]`, which entries are salient; they do not influence the scale. Only the rule
            "sigma" needs it, since a zero lowers a standard deviation. None: none.

    Returns:
        Codes, scales, and scales of rows where the grid has them.

    >>> found = quantize(torch.tensor([[7.0, -3.5, 1.0]]), Grid(scale="absmax"))
    >>> found.codes.tolist(), found.scale.tolist()
    ([[7, -4, 1]], [[1.0]])
    """
    out, in_features = weight.shape
    found = torch.empty(out, in_features, dtype=torch.int8, device=weight.device)
    scale = torch.empty(grid.scale_shape(out, in_features), dtype=grid.scale_dtype, device=weight.device)
    row_scale = weight.new_empty(out, dtype=torch.bfloat16) if grid.row_scale else None
    if salient is None:
        salient = torch.zeros(1, 1, dtype=torch.bool, device=weight.device).expand_as(weight)
    if grid.group_size == "tensor":
        scale.copy_(fit(weight.reshape(1, 1, -1), salient.reshape(1, 1, -1), grid).view(1, 1))
    for rows in row_blocks(out, in_features, weight.device):
        if grid.group_size != "tensor":
            left_out = _groups(salient[rows], grid, filling=True)
            fitted = fit(_groups(weight[rows], grid), left_out, grid).squeeze(-1)
            if row_scale is not None:
                row_scale[rows] = (fitted.abs().amax(1) / LARGEST).to(torch.bfloat16)
                fitted = whole_numbers(fitted, row_scale[rows])
            scale[rows] = fitted.to(scale.dtype)
        step = expand(scale_of(rows, scale, row_scale), grid.columns(in_features), in_features)
        found[rows] = codes(torch.where(step == 0, 0.0, weight[rows] / step), grid.levels, grid.bits)
    return Quantized(found, scale, row_scale)


LARGEST = 127
"""The largest int8 scale."""


def whole_numbers(scale: Tensor, unit: Tensor) -> Tensor:
    """Scales in units of a scale of their row, rounded to whole numbers from -127 to 127.

    Args:
        scale: `[rows, groups]`, float32.
        unit: `[rows]`.

    Returns:
        `[rows, groups]`, float32.
    """
    times = scale / unit.float().unsqueeze(1)
    return torch.nan_to_num(times, 0.0, 0.0, 0.0).round_().clamp_(-LARGEST, LARGEST)


def scale_of(rows: slice, scale: Tensor, row_scale: Tensor | None) -> Tensor:
    """The scales of some rows as real numbers: int8 scales are multiplied by their row's unit.

    Args:
        rows: which rows.
        scale: `[out, groups]`, or `[1, 1]` for all rows.
        row_scale: `[out]`, or None.

    Returns:
        `[rows, groups]` or `[1, 1]`, float32.
    """
    part = (scale if scale.shape[0] == 1 else scale[rows]).float()
    return part if row_scale is None else part * row_scale[rows].float().unsqueeze(1)


def expand(scale: Tensor, columns: int, in_features: int) -> Tensor:
    """Scales of groups repeated for each column.

    Args:
        scale: `[rows, groups]`.
        columns: columns of a group.
        in_features: columns of a row; the last group may be cut short.

    Returns:
        `[rows, in]`, float32; `[rows, 1]` where a row has one scale.

    >>> expand(torch.tensor([[1.0, 2.0]]), 2, 3).tolist()
    [[1.0, 1.0, 2.0]]
    """
    if scale.shape[1] == 1:
        return scale.float()
    return scale.float().repeat_interleave(columns, dim=1)[:, :in_features]


def row_blocks(out: int, in_features: int, device: torch.device | None = None) -> list[slice]:
    """Slices of rows that cover `[out, in]` in pieces of about `WORKING_SET` entries (on a GPU `ON_DEVICE`).

    >>> row_blocks(300, 1024)
    [slice(0, 256, None), slice(256, 300, None)]
    """
    size = WORKING_SET if device is None or device.type == "cpu" else ON_DEVICE
    step = max(1, size // max(1, in_features))
    return [slice(start, min(start + step, out)) for start in range(0, out, step)]


def _groups(rows: Tensor, grid: Grid, filling: float = 0) -> Tensor:
    """Rows `[rows, in]` cut into groups `[rows, groups, columns]`; `filling` completes the last group."""
    columns = grid.columns(rows.shape[1])
    padded = torch.nn.functional.pad(rows, (0, -rows.shape[1] % columns), value=filling)
    return padded.view(rows.shape[0], -1, columns)
