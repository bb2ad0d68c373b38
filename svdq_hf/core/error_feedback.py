"""GPTQ's error feedback: the error of rounding one column is compensated by the columns not rounded yet.

For those who have data, or batches that `calibration.synthetic` makes. With H = X^T X of the layer's
inputs, rounding column j by e changes the outputs least if the later columns move by
`-e * [H^-1]_j,later / [H^-1]_jj` (Optimal Brain Surgeon; GPTQ, arXiv 2210.17323, takes all columns in order
and all rows at once). The scales are fitted group by group, to the weights as moved by then. Not here:
which weights are salient (`core.saliency`), and how codes are stored (`core.packing`).
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from svdq_hf.core.grid import Grid
from svdq_hf.core.hessian import damped_inverse
from svdq_hf.core.levels import codes
from svdq_hf.core.packing import RANGES
from svdq_hf.core.rounding import LARGEST, Quantized, whole_numbers
from svdq_hf.core.scales import fit


def quantize_with_feedback(weight: Tensor, grid: Grid, gram: Tensor, kept: Tensor) -> Quantized:
    """Round a weight as `rounding.quantize` does, column by column, with error feedback.

    Args:
        weight: `[out, in]`, float32; its column scale has been taken out.
        grid: layout of the scales; its `group_size` must be a number.
        gram: `X^T X` `[in, in]` of the inputs of `weight`, float32.
        kept: bool `[out, in]`, the salient entries. They get code zero and do not influence the scale; what
            the feedback would have moved them by counts as their error.

    Returns:
        Codes `[out, in]`, scales of `grid.scale_shape`, and scales of rows `[out]` where the grid has them.

    Raises:
        ValueError: `grid.group_size` is "row" or "tensor".

    Source: GPTQ, arXiv 2210.17323.
    """
    if not isinstance(grid.group_size, int):
        raise ValueError(f"error feedback needs scales of groups, not group_size={grid.group_size!r}")
    out, in_features = weight.shape
    group_columns = grid.columns(in_features)
    scale = torch.empty(grid.scale_shape(out, in_features), dtype=grid.scale_dtype, device=weight.device)
    unit = _row_units(weight, grid, kept) if grid.row_scale else None
    columns = _Columns(weight, kept, grid, _inverse_factor(gram))
    for group, start in enumerate(range(0, in_features, group_columns)):
        part = slice(start, min(start + group_columns, in_features))
        fitted = columns.fitted(part)
        if unit is not None:
            fitted = whole_numbers(fitted, unit)
        scale[:, group] = fitted.squeeze(1).to(scale.dtype)
        columns.round_group(part, scale[:, group].float() * (1.0 if unit is None else unit.float()))
    return Quantized(columns.codes, scale, unit)


def damped(gram: Tensor, per_column: Tensor | None, share: float) -> Tensor:
    """A Gram matrix with part of its mean diagonal added, so that feedback trusts it less.

    Args:
        gram: `X^T X` `[in, in]`.
        per_column: column scale `[in]` of the weight; the damping is equal for all columns after the scale
            has been taken out. None: no column scale.
        share: of the mean diagonal, what is added; 0 adds nothing.

    Returns:
        A new matrix `[in, in]`.

    >>> damped(torch.tensor([[2.0, 1.0], [1.0, 4.0]]), None, 1.0).tolist()
    [[5.0, 1.0], [1.0, 7.0]]
    """
    square = gram.new_ones(gram.shape[0]) if per_column is None else per_column.float().square()
    mean = (gram.diagonal() * square).mean()
    return gram + torch.diag(share * mean / square)


@dataclass
class _Columns:
    """A weight `[out, in]` whose first columns are rounded and whose later ones compensate for it.

    Attributes:
        weight: `[out, in]`, float32, as it was given.
        kept: bool `[out, in]`, see `quantize_with_feedback`.
        grid: layout of the scales.
        factor: `[in, in]`, of `_inverse_factor`.
        codes: `[out, in]`, int8, filled for the columns that are rounded.
        rest: `[out, in]`, the weight with what feedback has added.
        levels: value of each code, in units of the scale, float32.
    """

    weight: Tensor
    kept: Tensor
    grid: Grid
    factor: Tensor
    codes: Tensor = field(init=False)
    rest: Tensor = field(init=False)
    levels: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.codes = torch.empty_like(self.weight, dtype=torch.int8)
        self.rest = self.weight.clone()
        self.levels = torch.tensor(self.grid.table, dtype=torch.float32, device=self.weight.device)

    def fitted(self, part: slice) -> Tensor:
        """The scales `[out, 1]` of one group, fitted to its weights as feedback has moved them."""
        kept = self.kept[:, part]
        return fit(self.rest[:, part].masked_fill(kept, 0), kept, self.grid)

    def round_group(self, part: slice, step: Tensor) -> None:
        """Round the columns `part` of one group in turn, and spread each error over all later columns.

        step: `[out]`, float32, the group's scale in each row.
        """
        lost = torch.empty_like(self.rest[:, part])
        for place, column in enumerate(range(part.start, part.stop)):
            lost[:, place] = self._round(column, step)
            later = slice(column + 1, part.stop)
            self.rest[:, later] -= torch.outer(lost[:, place], self.factor[column, later])
        self.rest[:, part.stop :] -= lost @ self.factor[part, part.stop :]

    def _round(self, column: int, step: Tensor) -> Tensor:
        """Round one column; returns its error `[out]`, divided by the factor's diagonal entry."""
        now, kept = self.rest[:, column], self.kept[:, column]
        code = codes(torch.where(step == 0, 0.0, now / step), self.grid.levels, self.grid.bits)
        code[kept] = 0
        self.codes[:, column] = code
        level = self.levels[code.long() - RANGES[self.grid.bits][0]]
        stands_for = torch.where(kept, self.weight[:, column], step * level)
        return (now - stands_for) / self.factor[column, column]


def _row_units(weight: Tensor, grid: Grid, kept: Tensor) -> Tensor:
    """The scales `[out]` of the rows: fitted before any feedback, with room for what feedback may add."""
    columns = grid.columns(weight.shape[1])
    tops = [
        fit(group.masked_fill(mask, 0), mask, grid).abs()
        for group, mask in zip(torch.split(weight, columns, 1), torch.split(kept, columns, 1), strict=True)
    ]
    return (ROOM * torch.cat(tops, 1).amax(1) / LARGEST).to(torch.bfloat16)


ROOM = 1.25
"""Room in the scales of rows: feedback enlarges weights by about a tenth (measured on Gemma 3)."""


def _inverse_factor(gram: Tensor) -> Tensor:
    """Upper triangular U, float32, with `U^T U = H^-1`; rows of U are what the feedback needs."""
    factor: Tensor = torch.linalg.cholesky(damped_inverse(gram.double().clone()), upper=True)
    return factor.float()
