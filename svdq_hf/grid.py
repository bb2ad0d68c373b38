"""Float weights <-> 4-bit codes and scales: how finely scales are spread, and how they are chosen.

`w ~ scale * code`, code in -8..7, one scale for each group of a row, for each row, or for the whole
matrix. Sources: absmax is the rule of arXiv 2512.01343 section 3 and sigma its clipped variant;
the scale's sign as part of the search is llama.cpp's Q4_0 (the side with the largest weight gets
the code -8, of which there is one more). Not here: which weights are left out, and how codes are
stored.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from svdq_hf.packing import BLOCK, HIGHEST, LOWEST

GroupSize = int | Literal["row", "tensor"]
ScaleRule = Literal["mse", "absmax", "sigma"]

WORKING_SET = 1 << 18
"""Weights handled at a time: a megabyte of float32, so that temporaries stay in a core's cache."""


@dataclass(frozen=True)
class Grid:
    """How the scales of a matrix are laid out and fitted.

    group_size: columns that share a scale, a divisor of 64 from 8 on or a multiple of 64, or "row",
    or "tensor". scale: the rule. clip_sigma: where the rule "sigma" clips, in standard deviations.
    """

    group_size: GroupSize = 64
    scale: ScaleRule = "mse"
    clip_sigma: float = 2.5

    def __post_init__(self) -> None:
        size, allowed = (
            self.group_size,
            "a divisor of 64 from 8 on, a multiple of 64, 'row' or 'tensor'",
        )
        fits = (
            size in ("row", "tensor")
            if isinstance(size, str)
            else type(size) is int and size >= 8 and (BLOCK % size == 0 or size % BLOCK == 0)
        )
        if not fits:
            raise ValueError(f"group_size={size!r}: must be {allowed}")
        if self.scale not in get_args(ScaleRule):
            raise ValueError(f"scale={self.scale!r}: must be one of {list(get_args(ScaleRule))}")
        if not (type(self.clip_sigma) in (int, float) and 0 < self.clip_sigma < float("inf")):
            raise ValueError(f"clip_sigma={self.clip_sigma!r}: must be a number above 0")

    def columns(self, in_features: int) -> int:
        """Columns of a row that share a scale (the whole row for "row" and "tensor")."""
        return min(self.group_size, in_features) if isinstance(self.group_size, int) else in_features

    def scale_shape(self, out: int, in_features: int) -> tuple[int, int]:
        """Shape of the scales of `[out, in]`: `[out, ceil(in / group)]`, `[out, 1]` or `[1, 1]`."""
        if self.group_size == "tensor":
            return 1, 1
        return out, -(-in_features // self.columns(in_features))

    @property
    def scale_dtype(self) -> torch.dtype:
        """bfloat16 (float32's range in 16 bits) for groups; float32 where scales are few."""
        return torch.bfloat16 if isinstance(self.group_size, int) else torch.float32


def quantize(weight: Tensor, grid: Grid, salient: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Round `weight` `[out, in]`, float32, to codes `[out, in]`, int8, and their scales.

    salient: bool `[out, in]`, where the weight has been taken out and is zero; those entries get code
    zero and have no say in the scale. Only the rule "sigma", to which a zero is not the same as no
    weight, looks at it. A group of zeros gets scale zero.

    >>> codes, scale = quantize(torch.tensor([[7.0, -3.5, 1.0]]), Grid(scale="absmax"))
    >>> codes.tolist(), scale.tolist()
    ([[7, -4, 1]], [[1.0]])
    """
    out, in_features = weight.shape
    codes = torch.empty(out, in_features, dtype=torch.int8, device=weight.device)
    scale = torch.empty(grid.scale_shape(out, in_features), dtype=grid.scale_dtype, device=weight.device)
    if salient is None:
        salient = torch.zeros(1, 1, dtype=torch.bool, device=weight.device).expand_as(weight)
    if grid.group_size == "tensor":
        scale.fill_(_fit(weight.reshape(1, 1, -1), salient.reshape(1, 1, -1), grid).item())
    for rows in row_blocks(out, in_features):
        if grid.group_size != "tensor":
            left_out = _groups(salient[rows], grid, filling=True)
            scale[rows] = _fit(_groups(weight[rows], grid), left_out, grid).squeeze(-1).to(scale.dtype)
        step = expand(scale if scale.shape[0] == 1 else scale[rows], grid.columns(in_features), in_features)
        level = torch.where(step == 0, 0.0, weight[rows] / step)
        codes[rows] = level.round_().clamp_(LOWEST, HIGHEST).to(torch.int8)
    return codes, scale


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


def _fit(groups: Tensor, salient: Tensor, grid: Grid) -> Tensor:
    """One scale for each group `[..., columns]` -> `[..., 1]`, by the grid's rule."""
    top = groups.abs().amax(-1, keepdim=True)
    unit = groups / torch.where(top > 0, top, 1.0)  # in -1..1: squares neither overflow nor vanish
    return top * _RULES[grid.scale](unit, salient, grid)


def _absmax(unit: Tensor, salient: Tensor, grid: Grid) -> Tensor:
    return torch.full_like(unit[..., :1], 1 / HIGHEST)


def _sigma(unit: Tensor, salient: Tensor, grid: Grid) -> Tensor:
    kept = (~salient).sum(-1, keepdim=True).clamp(min=1)
    deviation = (unit.square().sum(-1, keepdim=True) / kept).sqrt()
    return (grid.clip_sigma * deviation).clamp(max=1) / HIGHEST


SIZES = 10
"""Clipping points tried on each side; 40 would leave 0.04 % less error at group 64 (measured)."""


def _mse(unit: Tensor, salient: Tensor, grid: Grid) -> Tensor:
    """Least squared error over the scale's size and sign.

    For codes q the best scale is `s = <w, q> / <q, q>` and the error that is left `|w|^2 - s <w, q>`,
    so each candidate is judged by its codes, with its own best scale, and one reduction less.
    """
    deviation = unit.square().mean(-1, keepdim=True).sqrt()
    highest = torch.ones_like(deviation)
    lowest = (2.2 * deviation).clamp(max=0.85)  # of normal weights, 4 bits clip at 2.7 sigma
    best_gain = torch.zeros_like(deviation)
    best = torch.zeros_like(deviation)
    codes, product = torch.empty_like(unit), torch.empty_like(unit)

    def judge(inverse_scale: Tensor) -> None:
        nonlocal best, best_gain
        torch.mul(unit, inverse_scale, out=codes).round_().clamp_(LOWEST, HIGHEST)
        along = torch.mul(unit, codes, out=product).sum(-1, keepdim=True)
        square = torch.mul(codes, codes, out=product).sum(-1, keepdim=True).clamp_(min=1)
        gain = along.square() / square
        best = torch.where(gain > best_gain, along / square, best)
        best_gain = torch.maximum(gain, best_gain)

    for step in range(SIZES):
        clip = lowest * (highest / lowest) ** (step / (SIZES - 1))
        judge((HIGHEST + 0.5) / clip)
        judge((LOWEST + 0.5) / clip)
    judge(torch.full_like(deviation, HIGHEST))  # absmax's codes: never worse than that rule
    judge(torch.where(best == 0, 0.0, 1 / best))  # codes anew for the best scale found
    return best


_RULES: dict[str, Callable[[Tensor, Tensor, Grid], Tensor]] = {
    "absmax": _absmax,
    "sigma": _sigma,
    "mse": _mse,
}
