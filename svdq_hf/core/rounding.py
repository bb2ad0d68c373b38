"""Rounding of a weight `[out, in]` to codes and scales, each weight to its nearest level.

In blocks of rows that stay in a core's cache.
Not here: error feedback (`error_feedback`), and how codes are stored (`packing`).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from svdq_hf.core.grid import Grid
from svdq_hf.core.levels import codes
from svdq_hf.core.scales import fit

WORKING_SET = 1 << 18
"""Weights handled at a time: a megabyte of float32, so that temporaries stay in a core's cache."""


class Quantized(NamedTuple):
    """Codes `[out, in]`, int8; scales of `grid.scale_shape`; and the rows' `[out]`, bfloat16, or None."""

    codes: Tensor
    scale: Tensor
    row_scale: Tensor | None


def quantize(weight: Tensor, grid: Grid, salient: Tensor | None = None) -> Quantized:
    """Round `weight` `[out, in]`, float32; a column scale has been taken out already.

    salient: bool `[out, in]`, where the weight has been taken out and is zero; those entries get code
    zero and have no say in the scale. Only the rule "sigma", to which a zero is not the same as no
    weight, looks at it. A group of zeros gets scale zero.

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
        scale.fill_(fit(weight.reshape(1, 1, -1), salient.reshape(1, 1, -1), grid).item())
    for rows in row_blocks(out, in_features):
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
"""The largest scale of 8 bits with a sign."""


def whole_numbers(scale: Tensor, unit: Tensor) -> Tensor:
    """Scales `[rows, groups]` as whole numbers, float32, in units `[rows]` of their rows."""
    times = scale / unit.float().unsqueeze(1)
    return torch.nan_to_num(times, 0.0, 0.0, 0.0).round_().clamp_(-LARGEST, LARGEST)


def scale_of(rows: slice, scale: Tensor, row_scale: Tensor | None) -> Tensor:
    """The scales of some rows, float32, `[rows or 1, groups]`."""
    part = (scale if scale.shape[0] == 1 else scale[rows]).float()
    return part if row_scale is None else part * row_scale[rows].float().unsqueeze(1)


def expand(scale: Tensor, columns: int, in_features: int) -> Tensor:
    """Scales `[rows, groups]` as float32 `[rows, in]` (or `[rows, 1]` where there is one a row).

    >>> expand(torch.tensor([[1.0, 2.0]]), 2, 3).tolist()
    [[1.0, 1.0, 2.0]]
    """
    if scale.shape[1] == 1:
        return scale.float()
    return scale.float().repeat_interleave(columns, dim=1)[:, :in_features]


def row_blocks(out: int, in_features: int) -> list[slice]:
    """Slices of rows that cover `[out, in]` in pieces of about `WORKING_SET` entries.

    >>> row_blocks(300, 1024)
    [slice(0, 256, None), slice(256, 300, None)]
    """
    step = max(1, WORKING_SET // max(1, in_features))
    return [slice(start, min(start + step, out)) for start in range(0, out, step)]


def _groups(rows: Tensor, grid: Grid, filling: float = 0) -> Tensor:
    """Rows `[rows, in]` as groups `[rows, groups, columns]`, the last one filled up."""
    columns = grid.columns(rows.shape[1])
    padded = torch.nn.functional.pad(rows, (0, -rows.shape[1] % columns), value=filling)
    return padded.view(rows.shape[0], -1, columns)
