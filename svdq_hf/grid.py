"""Float weights <-> codes of a few bits, and scales: how finely scales are spread, and how they are chosen.

`w ~ scale * level(code) * column_scale`: one scale for each group of a row, for each row, or for the whole
matrix; sixteen levels (of 4 bits); and, if the grid has it, one scale for each column, taken out beforehand.

Sources: absmax is the rule of arXiv 2512.01343 section 3 and sigma its clipped variant; the scale's sign as
part of the search is llama.cpp's Q4_0 (the side with the largest weight gets the code -8, of which there is
one more); a second axis of scales is SINQ's (arXiv 2509.22944). Not here: which weights are left out, and
how codes are stored.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from svdq_hf.levels import TABLES, Levels, codes, highest, nearest
from svdq_hf.packing import BLOCK

GroupSize = int | Literal["row", "tensor"]
ScaleRule = Literal["mse", "absmax", "sigma"]

WORKING_SET = 1 << 18
"""Weights handled at a time: a megabyte of float32, so that temporaries stay in a core's cache."""


@dataclass(frozen=True)
class Grid:
    """How the scales of a matrix are laid out and fitted.

    group_size: columns that share a scale, a divisor of 64 from 8 on or a multiple of 64, or "row",
    or "tensor". scale: the rule. clip_sigma: where the rule "sigma" clips, in standard deviations.
    levels: what codes stand for. column_scale: whether each column has a scale of its own as well.
    scale_bits: of a group's scale, 16 or 8; where they are 8, each row has a factor in 16 bits.
    bits: of a code: 3, 4 or 8.
    """

    group_size: GroupSize = 64
    scale: ScaleRule = "mse"
    clip_sigma: float = 2.5
    levels: Levels = "linear"
    column_scale: bool = False
    scale_bits: Literal[16, 8] = 16
    bits: Literal[3, 4, 8] = 4

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
        if type(self.bits) is not int or self.bits not in TABLES:
            raise ValueError(f"bits={self.bits!r}: must be one of {list(TABLES)}")
        if self.levels not in TABLES[self.bits]:
            allowed = f"one of {list(TABLES[self.bits])} where bits is {self.bits}"
            raise ValueError(f"levels={self.levels!r}: must be {allowed}")
        if type(self.scale_bits) is not int or self.scale_bits not in (8, 16):
            raise ValueError(f"scale_bits={self.scale_bits!r}: must be 8 or 16")
        if type(self.column_scale) is not bool:
            raise ValueError(f"column_scale={self.column_scale!r}: must be true or false")
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
        """bfloat16 (float32's range in 16 bits) or int8 for groups; float32 where scales are few."""
        if not isinstance(self.group_size, int):
            return torch.float32
        return torch.int8 if self.row_scale else torch.bfloat16

    @property
    def table(self) -> tuple[int, ...]:
        """The levels of all codes, from the lowest on."""
        return TABLES[self.bits][self.levels]

    @property
    def row_scale(self) -> bool:
        """Whether the groups' scales are whole numbers, in units of a scale of their row."""
        return isinstance(self.group_size, int) and self.scale_bits == 8


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


def fit(groups: Tensor, salient: Tensor, grid: Grid) -> Tensor:
    """One scale for each group `[..., columns]` -> `[..., 1]`, by the grid's rule.

    salient: bool of that shape, where the weight has been taken out and is zero.
    """
    top = groups.abs().amax(-1, keepdim=True)
    unit = groups / torch.where(top > 0, top, 1.0)  # in -1..1: squares neither overflow nor vanish
    return top * _RULES[grid.scale](unit, salient, grid)


def _absmax(unit: Tensor, salient: Tensor, grid: Grid) -> Tensor:
    return torch.full_like(unit[..., :1], 1 / highest(grid.levels, grid.bits))


def _sigma(unit: Tensor, salient: Tensor, grid: Grid) -> Tensor:
    kept = (~salient).sum(-1, keepdim=True).clamp(min=1)
    deviation = (unit.square().sum(-1, keepdim=True) / kept).sqrt()
    return (grid.clip_sigma * deviation).clamp(max=1) / highest(grid.levels, grid.bits)


SIZES = {"linear": 10, "normal": 6}
"""Clipping points tried on each side; more would leave less than 0.05 % less error (measured)."""

LEAST_CLIP = {3: 1.4, 4: 2.2, 8: 3.3}
"""The nearest clipping point tried, in standard deviations, by bits: normal weights clip at 2.1, 2.7, 3.9."""


def _mse(unit: Tensor, salient: Tensor, grid: Grid) -> Tensor:
    """Least squared error over the scale's size and sign.

    For levels q the best scale is `s = <w, q> / <q, q>` and the error that is left `|w|^2 - s <w, q>`,
    so each candidate is judged by its levels, with its own best scale, and one reduction less.
    """
    top, bottom = grid.table[-1], grid.table[0]
    beyond = 0.5 if grid.levels == "linear" else 0.0  # what rounds to the outermost level still
    deviation = unit.square().mean(-1, keepdim=True).sqrt()
    lowest = (LEAST_CLIP[grid.bits] * deviation).clamp(1e-6, 0.85)
    best_gain = torch.zeros_like(deviation)
    best = torch.zeros_like(deviation)
    scaled, product = torch.empty_like(unit), torch.empty_like(unit)

    def judge(inverse_scale: Tensor) -> None:
        nonlocal best, best_gain
        level = nearest(torch.mul(unit, inverse_scale, out=scaled), grid.levels, grid.bits)
        along = torch.mul(unit, level, out=product).sum(-1, keepdim=True)
        square = torch.mul(level, level, out=product).sum(-1, keepdim=True).clamp_(min=1)
        gain = along.square() / square
        best = torch.where(gain > best_gain, along / square, best)
        best_gain = torch.maximum(gain, best_gain)

    sizes = SIZES[grid.levels]
    for step in range(sizes):
        clip = lowest ** (1 - step / (sizes - 1))
        judge((top + beyond) / clip)
        if bottom != -top:  # else the other sign's codes are the same
            judge((bottom + beyond) / clip)
    judge(torch.full_like(deviation, top))  # absmax's codes: never worse than that rule
    judge(torch.where(best == 0, 0.0, 1 / best))  # codes anew for the best scale found
    return best


_RULES: dict[str, Callable[[Tensor, Tensor, Grid], Tensor]] = {
    "absmax": _absmax,
    "sigma": _sigma,
    "mse": _mse,
}
