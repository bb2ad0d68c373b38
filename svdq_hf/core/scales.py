"""Scale rules: fit one scale to a group of weights (absmax, clipped at some sigmas, least squared error).

Sources: absmax is the rule of arXiv 2512.01343 section 3 and sigma its clipped variant; the scale's sign as
part of the search is llama.cpp's Q4_0 (the side with the largest weight gets the code -8, of which there is
one more). A new rule is one function, one row of `RULES` and its name in `ScaleRule` of `core.grid_values`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from svdq_hf.core.grid import Grid
from svdq_hf.core.levels import highest, nearest


def fit(groups: Tensor, salient: Tensor, grid: Grid) -> Tensor:
    """One scale for each group, by the grid's rule.

    Args:
        groups: weights `[..., columns]`, float32; salient entries are zero.
        salient: bool of that shape, which entries are salient.
        grid: names the rule, the levels and the bits.

    Returns:
        Scales `[..., 1]`, float32; negative ones are possible with "mse".
    """
    top = groups.abs().amax(-1, keepdim=True)
    unit = groups / torch.where(top > 0, top, 1.0)  # in -1..1: squares neither overflow nor vanish
    return top * RULES[grid.scale](unit, salient, grid)


def _absmax(unit: Tensor, salient: Tensor, grid: Grid) -> Tensor:
    return torch.full_like(unit[..., :1], 1 / highest(grid.levels, grid.bits))


def _sigma(unit: Tensor, salient: Tensor, grid: Grid) -> Tensor:
    kept = (~salient).sum(-1, keepdim=True).clamp(min=1)
    deviation = (unit.square().sum(-1, keepdim=True) / kept).sqrt()
    return (grid.clip_sigma * deviation).clamp(max=1) / highest(grid.levels, grid.bits)


SIZES = {"linear": 10, "normal": 6, "iq4_nl": 10}
"""Clipping points tried on each side; more would leave less than 0.05 % less error (measured)."""

LEAST_CLIP = {3: 1.4, 4: 2.2, 8: 3.3}
"""The nearest clipping point tried, in standard deviations, by bits: normal weights clip at 2.1, 2.7, 3.9."""


def _mse(unit: Tensor, salient: Tensor, grid: Grid) -> Tensor:
    """Least squared error over the scale's size and sign.

    For levels q the best scale is `s = <w, q> / <q, q>`, and the error that remains is `|w|^2 - s <w, q>`.
    So each candidate is judged by its levels, with the scale that suits them best: one reduction less. Sums
    are float64: what candidates differ by is a small part of them, and float32 would choose by its rounding.
    """
    top, bottom = grid.table[-1], grid.table[0]
    beyond = 0.5 if grid.levels == "linear" else 0.0  # what rounds to the outermost level still
    deviation = unit.square().mean(-1, keepdim=True).sqrt()
    lowest = (LEAST_CLIP[grid.bits] * deviation).clamp(1e-6, 0.85)
    best = torch.zeros_like(deviation)
    best_gain = best.double()
    scaled, product = torch.empty_like(unit), torch.empty_like(unit)

    def judge(inverse_scale: Tensor) -> None:
        nonlocal best, best_gain
        level = nearest(torch.mul(unit, inverse_scale, out=scaled), grid.levels, grid.bits)
        along = torch.mul(unit, level, out=product).sum(-1, keepdim=True, dtype=torch.float64)
        square = torch.mul(level, level, out=product).sum(-1, keepdim=True, dtype=torch.float64)
        fitted = along / square.clamp_(min=1)
        gain = along * fitted
        best = torch.where(gain > best_gain, fitted.float(), best)
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


RULES: dict[str, Callable[[Tensor, Tensor, Grid], Tensor]] = {
    "absmax": _absmax,
    "sigma": _sigma,
    "mse": _mse,
}
