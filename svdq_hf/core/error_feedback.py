"""Error feedback: what rounding one column loses is made good by the columns that are not rounded yet.

For those who have data, or take what `synthetic` makes for it. With H = X^T X of the layer's inputs,
rounding column j by e changes the outputs least if the later columns move by `-e * [H^-1]_j,later /
[H^-1]_jj` (Optimal Brain Surgeon; GPTQ, Frantar et al. 2022, takes all columns in order and all rows at
once). The scales are fitted group by group, to the weights as they are by then. Not here: which weights are
salient, and how codes are stored.
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
    """Round `weight` `[out, in]`, float32, as `grid.quantize` does, with feedback by `gram` `[in, in]`.

    kept: bool `[out, in]`, the entries that are stored as they are: they get code zero and no say in the
    scale, and what the feedback would have moved them by counts as their error.

    Raises:
        ValueError: the grid's scales are not those of groups.
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
    """`gram` `[in, in]` with `share` of its mean diagonal added, as the grid sees its columns.

    >>> damped(torch.tensor([[2.0, 1.0], [1.0, 4.0]]), None, 1.0).tolist()
    [[5.0, 1.0], [1.0, 7.0]]
    """
    square = gram.new_ones(gram.shape[0]) if per_column is None else per_column.float().square()
    mean = (gram.diagonal() * square).mean()
    return gram + torch.diag(share * mean / square)


@dataclass
class _Columns:
    """A weight `[out, in]` of which the first columns are rounded, and the later ones moved for it.

    kept: as `quantize_with_feedback` has it. factor: of `_inverse_factor`, `[in, in]`. codes: `[out, in]`,
    int8, those of the columns that are rounded. rest: `[out, in]`, the weight with what feedback added.
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
        """The scales `[out, 1]` of one group, fitted to what its weights are by now."""
        kept = self.kept[:, part]
        return fit(self.rest[:, part].masked_fill(kept, 0), kept, self.grid)

    def round_group(self, part: slice, step: Tensor) -> None:
        """Round one group's columns in turn, in units of `step` `[out]`, each error spread over all later."""
        lost = torch.empty_like(self.rest[:, part])
        for place, column in enumerate(range(part.start, part.stop)):
            lost[:, place] = self._round(column, step)
            later = slice(column + 1, part.stop)
            self.rest[:, later] -= torch.outer(lost[:, place], self.factor[column, later])
        self.rest[:, part.stop :] -= lost @ self.factor[part, part.stop :]

    def _round(self, column: int, step: Tensor) -> Tensor:
        """Round one column; its error `[out]` in the factor's units."""
        now, kept = self.rest[:, column], self.kept[:, column]
        code = codes(torch.where(step == 0, 0.0, now / step), self.grid.levels, self.grid.bits)
        code[kept] = 0
        self.codes[:, column] = code
        level = self.levels[code.long() - RANGES[self.grid.bits][0]]
        stands_for = torch.where(kept, self.weight[:, column], step * level)
        return (now - stands_for) / self.factor[column, column]


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
