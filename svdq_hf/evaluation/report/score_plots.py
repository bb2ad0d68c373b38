"""Plots against k: a group's score, and its distance from FP32.

What is drawn is what the tables hold; nothing is smoothed. Each method is drawn a little beside its
k, so that intervals do not hide each other.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from svdq_hf.evaluation.report.cells import Group
from svdq_hf.evaluation.report.drawing import blank, lettering, style, widened, written_out
from svdq_hf.evaluation.report.palette import Look
from svdq_hf.evaluation.report.rows import NAMES, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_BARRED: Final = 3  # methods; the bars of more would hide each other
MAIN: Final = ("svd", "magnitude")

Measure = Callable[[Row], float | None]
Ends = Callable[[Row], tuple[float, float] | None]


def score_picture(group: Group, rows: Sequence[Row], looks: Mapping[str, Look]) -> "Figure | None":
    """The headline score against k, with intervals.

    Args:
        group: the cells.
        rows: of the group's main table.
        looks: colour and marker of each method.

    Returns:
        The figure; None where no score is a number.
    """
    name = group.headline.replace("_", " ")
    ends = _intervals(group)
    barred = _barred(group) if any(ends(row) for row in rows) else []

    def score(row: Row) -> float | None:
        return _finite(row.scores.get(group.headline))

    if all(score(row) is None for row in rows):
        return None
    with style():
        figure, axes = blank(f"{lettering(name)} against k{_said(barred)}", 3.9)
        _levels(axes, rows, looks, score)
        _curves(axes, rows, looks, score)
        _bars(axes, [row for row in rows if row.method in barred], looks, ends)
        widened(axes, _least(group, rows))
        _finish(figure, axes, group, lettering(name))
    return figure


def kl_picture(group: Group, rows: Sequence[Row], looks: Mapping[str, Look]) -> "Figure | None":
    """KL from FP32 against k, both logarithmic.

    Args:
        group: the cells.
        rows: of the group's main table.
        looks: colour and marker of each method.

    Returns:
        The figure; None where no KL is above 0.
    """

    def kl(row: Row) -> float | None:
        value = _finite(row.kl)
        return value if value is not None and value > 0 else None

    if all(kl(row) is None for row in rows):
        return None
    with style():
        figure, axes = blank("KL from FP32 against k", 3.9)
        _levels(axes, rows, looks, kl)
        _curves(axes, rows, looks, kl)
        written_out(axes)
        _finish(figure, axes, group, "KL (nats)")
    return figure


SMALLEST: Final = 0.05
"""The least that an axis of scores spans: a share of FP32's perplexity, five points of any other score."""


def _least(group: Group, rows: Sequence[Row]) -> float:
    dense = next((_finite(row.scores.get(group.headline)) for row in rows if row.method == "fp32"), None)
    return SMALLEST * (abs(dense) if group.unit == "tokens" and dense else 1.0)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _intervals(group: Group) -> Ends:
    """The interval of the headline: Wilson's for a share of right answers, otherwise over seeds."""
    if group.headline == "accuracy":
        return lambda row: row.interval
    return lambda row: row.band[1:] if row.band else None


def _barred(group: Group) -> list[str]:
    """The methods whose intervals are drawn: FP32, and few others; the table has all of them."""
    tried = [method for method in group.methods if method not in NAMES]
    few = tried if len(tried) <= MOST_BARRED else [method for method in tried if method in MAIN] or tried[:2]
    return ["fp32", *few]


def _said(barred: Sequence[str]) -> str:
    return f" (95 %: {', '.join(lettering(NAMES.get(name, name)) for name in barred)})" if barred else ""


def _levels(axes: "Axes", rows: Sequence[Row], looks: Mapping[str, Look], measure: Measure) -> None:
    """FP32 and "nothing salient" have no k: a horizontal line each."""
    for row in rows:
        value = measure(row)
        if row.method in NAMES and value is not None:
            dashes = "-" if row.method == "fp32" else "--"
            axes.axhline(value, color=looks[row.method].colour, linestyle=dashes, label=row.label)


def _curves(axes: "Axes", rows: Sequence[Row], looks: Mapping[str, Look], measure: Measure) -> None:
    for label, aside in _aside(rows).items():
        points = [(row, value) for row in rows if row.label == label and (value := measure(row)) is not None]
        if points:
            look = looks[points[0][0].method]
            ks, values = [row.k * aside for row, _ in points], [value for _, value in points]
            shade = _shade(points[0][0], rows)
            axes.plot(ks, values, color=look.colour, marker=look.marker, label=lettering(label), alpha=shade)


def _shade(row: Row, rows: Sequence[Row]) -> float:
    """Opacity of a curve: 1 where a method has one curve; with one for each rank, higher ranks are darker."""
    ranks = sorted({other.rank for other in rows if other.method == row.method and other.rank is not None})
    return 1.0 if len(ranks) < 2 or row.rank is None else 0.3 + 0.7 * ranks.index(row.rank) / (len(ranks) - 1)


def _bars(axes: "Axes", rows: Sequence[Row], looks: Mapping[str, Look], ends: Ends) -> None:
    """Intervals: a band across for FP32, a bar at each k for a method."""
    aside = _aside(rows)
    for row in rows:
        interval = ends(row)
        if interval and row.method == "fp32":
            axes.axhspan(*interval, color=looks["fp32"].colour, alpha=0.08, linewidth=0)
        elif interval and row.label in aside:
            colour = looks[row.method].colour
            axes.plot([row.k * aside[row.label]] * 2, interval, color=colour, linewidth=1.2, alpha=0.5)


def _aside(rows: Sequence[Row]) -> dict[str, float]:
    """The factor by which each method is drawn beside its k."""
    labels = list(dict.fromkeys(row.label for row in rows if row.k > 0))
    return {label: 1.06 ** (number - (len(labels) - 1) / 2) for number, label in enumerate(labels)}


def _finish(figure: "Figure", axes: "Axes", group: Group, title: str) -> None:
    ks = [k for k in group.ks if k > 0]
    axes.set_xscale("log")
    if ks:
        axes.set_xlim(min(ks) / 1.6, max(ks) * 1.6)
    axes.set_xticks(ks, [f"{k:g}" for k in ks], minor=False)
    axes.minorticks_off()
    axes.set_xlabel("k, salient weights per layer")
    axes.set_ylabel(title)
    figure.legend(loc="outside lower center", ncols=3, fontsize=9, columnspacing=1.2, handlelength=1.6)
