"""Error feedback: what rounding one column loses is made good by the columns that are not rounded yet.

For those who have data, or take what `synthetic` makes for it. With H = X^T X of the layer's inputs,
rounding column j by e changes the outputs least if the later columns move by `-e * [H^-1]_j,later /
[H^-1]_jj` (Optimal Brain Surgeon; GPTQ, Frantar et al. 2022, takes all columns in order and all rows at
once). The scales are fitted group by group, to the weights as they are by then. Not here: which weights are
salient, and how codes are stored.
"""

import torch
from torch import Tensor

from svdq_hf.core.grid import Grid
from svdq_hf.core.hessian import damped_inverse
from svdq_hf.core.levels import codes
from svdq_hf.core.packing import RANGES
from svdq_hf.core.rounding import LARGEST, Quantized, whole_numbers
from svdq_hf.core.scales import fit


def quantize_with_feedback(weight: Tensor, grid: Grid, gram: Tensor, kept: Tensor) -> Quantized:
    """Round `weight` `[out, in]`, float32, as `grid.quantize` does, with feedback by `gram` `[in, in]`.

    kept: bool `[out, in]`, the entries that are stored as they are: they get code zero and no say in the
    scale, and what the feedback would have moved them by counts as their error.

    Raises:
        ValueError: the grid's scales are not those of groups.
    """
    if not isinstance(grid.group_size, int):
        raise ValueError(f"error feedback needs scales of groups, not group_size={grid.group_size!r}")
    out, in_features = weight.shape
    columns = grid.columns(in_features)
    found = torch.empty_like(weight, dtype=torch.int8)
    scale = torch.empty(grid.scale_shape(out, in_features), dtype=grid.scale_dtype, device=weight.device)
    unit = _row_units(weight, grid, kept) if grid.row_scale else None
    factor = _inverse_factor(gram)
    rest = weight.clone()
    for group, start in enumerate(range(0, in_features, columns)):
        part = slice(start, min(start + columns, in_features))
        free = rest[:, part].masked_fill(kept[:, part], 0)
        fitted = fit(free, kept[:, part], grid)
        if unit is not None:
            fitted = whole_numbers(fitted, unit)
        scale[:, group] = fitted.squeeze(1).to(scale.dtype)
        step = scale[:, group].float() * (1.0 if unit is None else unit.float())
        lost = _round_group(rest, weight, kept, part, step, factor, found, grid)
        rest[:, part.stop :] -= lost @ factor[part, part.stop :]
    return Quantized(found, scale, unit)


def damped(gram: Tensor, per_column: Tensor | None, share: float) -> Tensor:
    """`gram` `[in, in]` with `share` of its mean diagonal added, as the grid sees its columns.

    >>> damped(torch.tensor([[2.0, 1.0], [1.0, 4.0]]), None, 1.0).tolist()
    [[5.0, 1.0], [1.0, 7.0]]
    """
    square = gram.new_ones(gram.shape[0]) if per_column is None else per_column.float().square()
    mean = (gram.diagonal() * square).mean()
    return gram + torch.diag(share * mean / square)


def _round_group(
    rest: Tensor,
    weight: Tensor,
    kept: Tensor,
    part: slice,
    step: Tensor,
    factor: Tensor,
    found: Tensor,
    grid: Grid,
) -> Tensor:
    """Round one group's columns in turn, each error spread over the group; the errors `[out, columns]`."""
    levels = torch.tensor(grid.table, dtype=torch.float32, device=weight.device)
    lost, lowest = torch.empty_like(rest[:, part]), RANGES[grid.bits][0]
    for place, column in enumerate(range(part.start, part.stop)):
        now = rest[:, column]
        code = codes(torch.where(step == 0, 0.0, now / step), grid.levels, grid.bits)
        code[kept[:, column]] = 0
        stands_for = torch.where(kept[:, column], weight[:, column], step * levels[code.long() - lowest])
        found[:, column] = code
        lost[:, place] = (now - stands_for) / factor[column, column]
        later = slice(column + 1, part.stop)
        rest[:, later] -= torch.outer(lost[:, place], factor[column, later])
    return lost


def _row_units(weight: Tensor, grid: Grid, kept: Tensor) -> Tensor:
    """The rows' scales: those of the weights before any feedback, with room for what it may add."""
    columns = grid.columns(weight.shape[1])
    tops = [
        fit(group.masked_fill(mask, 0), mask, grid).abs()
        for group, mask in zip(torch.split(weight, columns, 1), torch.split(kept, columns, 1), strict=True)
    ]
    return (ROOM * torch.cat(tops, 1).amax(1) / LARGEST).to(torch.bfloat16)


ROOM = 1.25
"""Feedback makes weights larger: by a tenth, as a rule (measured on Gemma 3)."""


def _inverse_factor(gram: Tensor) -> Tensor:
    """Upper triangular U, float32, with `U^T U = H^-1`; rows of U are what the feedback needs."""
    factor: Tensor = torch.linalg.cholesky(damped_inverse(gram.double().clone()), upper=True)
    return factor.float()
