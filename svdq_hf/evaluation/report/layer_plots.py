"""Plots of a model's layers: how far two choices overlap, and the relative error of each weight.

Layers are listed in the order of the data, top to bottom; the part that all names share is left out.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Final

from svdq_hf.evaluation.report.cells import Cell, Group, Overlap
from svdq_hf.evaluation.report.drawing import blank, lettering, style
from svdq_hf.evaluation.report.palette import Look
from svdq_hf.evaluation.report.rows import NAMES
from svdq_hf.evaluation.report.short_names import short_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_NAMED: Final = 60  # layers; of more, only some have their names beside them
ROW: Final = 0.165  # inches: a line of 9-point text


def overlap_picture(overlaps: Sequence[Overlap], other: str) -> "Figure":
    """Share of svd's choice that another score chooses too, layer by k; the mean over several models.

    Args:
        overlaps: of any number of other scores.
        other: the score that is drawn.
    """
    found = [overlap for overlap in overlaps if overlap.other == other]
    layers = list(dict.fromkeys(overlap.layer for overlap in found))
    ks = sorted({overlap.k for overlap in found})
    shares = _means(((overlap.layer, overlap.k), overlap.share) for overlap in found)
    grid = [[shares.get((layer, k), math.nan) for k in ks] for layer in layers]
    with style():
        figure, axes = blank(f"share of svd's choice that {lettering(other)} makes too, %", _height(layers))
        mesh = axes.pcolormesh(grid, cmap="cividis", vmin=0, vmax=1, edgecolors="face", linewidth=0.3)
        axes.set_xticks([number + 0.5 for number in range(len(ks))], [f"{k:g}" for k in ks])
        axes.set_xlabel("k, salient weights per layer")
        _name(axes, layers, 0.5)
        if len(layers) <= MOST_NAMED and len(ks) <= 12:
            _write(axes, grid)
        else:
            figure.colorbar(mesh, location="bottom", aspect=40)
    return figure


def error_picture(group: Group, looks: Mapping[str, Look]) -> "Figure | None":
    """Relative error of each layer's weight at the highest k, by method.

    Args:
        group: the cells.
        looks: colour and marker of each method.

    Returns:
        The figure; None where no error is known.
    """
    known = [cell for cell in group.cells if cell.relative_error]
    if not known:
        return None
    k = max(cell.k for cell in known)
    drawn = [cell for cell in known if cell.k == k or cell.method in NAMES]
    layers = list(dict.fromkeys(layer for cell in drawn for layer in cell.relative_error or {}))
    with style():
        figure, axes = blank(f"relative error of each weight, k = {k:g}", _height(layers) + 0.5)
        for method in group.methods:
            _dots(axes, layers, [cell for cell in drawn if cell.method == method], looks[method])
        axes.set_xlabel("relative error")
        axes.set_xlim(left=0)
        _name(axes, layers, 0.0)
        figure.legend(loc="outside lower center", ncols=3, fontsize=9, columnspacing=1.2, handlelength=1.6)
    return figure


def _means(pairs: Iterable[tuple[tuple[str, float], float]]) -> dict[tuple[str, float], float]:
    found: dict[tuple[str, float], list[float]] = {}
    for key, value in pairs:
        found.setdefault(key, []).append(value)
    return {key: fmean(values) for key, values in found.items()}


def _height(layers: Sequence[str]) -> float:
    """Height in inches: a line for each layer that is named, and a third of one for each of the others."""
    return 1.1 + ROW * min(len(layers), MOST_NAMED) + ROW / 3 * max(0, len(layers) - MOST_NAMED)


def _name(axes: "Axes", layers: Sequence[str], middle: float) -> None:
    step = 1 + 3 * (len(layers) > MOST_NAMED)
    names = [lettering(name) for name in short_names(layers)][::step]
    axes.set_yticks([number * step + middle for number in range(len(names))], names, fontsize=8)
    axes.set_ylim(len(layers) - 0.5 + middle, middle - 0.5)
    axes.tick_params(axis="y", length=0)


def _write(axes: "Axes", grid: Sequence[Sequence[float]]) -> None:
    """Each share as a whole percentage, light on dark and dark on light."""
    axes.grid(visible=False)
    for down, shares in enumerate(grid):
        for along, share in enumerate(shares):
            if not math.isnan(share):
                ink = "#111111" if share > 0.5 else "#ffffff"
                text = axes.text(along + 0.5, down + 0.5, f"{100 * share:.0f}", color=ink, fontsize=8)
                text.set(ha="center", va="center_baseline")


def _dots(axes: "Axes", layers: Sequence[str], cells: Sequence[Cell], look: Look) -> None:
    """The errors of one method, each the mean over its seeds."""
    found = [(cell.relative_error or {}) for cell in cells]
    errors = [[one[layer] for one in found if layer in one] for layer in layers]
    points = [(fmean(values), number) for number, values in enumerate(errors) if values]
    points = [point for point in points if math.isfinite(point[0])]
    if points:
        name = lettering(NAMES.get(cells[0].method, cells[0].method))
        axes.plot(
            *zip(*points, strict=True), look.marker or ".", color=look.colour, label=name, markersize=4.5
        )
