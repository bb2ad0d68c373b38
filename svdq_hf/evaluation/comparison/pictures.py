"""Pictures of a comparison: how far each model is from the reference, its size, its speed.

What is drawn is what the table holds. Not here: the drawing's style (`evaluation.report.drawing`), the page
(`evaluation.comparison.page`).
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from svdq_hf.evaluation.comparison.result import ComparedModel, ComparisonResult
from svdq_hf.evaluation.comparison.statistics import Estimate
from svdq_hf.evaluation.report.drawing import blank, lettering, style
from svdq_hf.evaluation.report.palette import INK, KNOWN

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOUR = KNOWN["svd"].colour
OTHER = KNOWN["magnitude"].colour
HEIGHT, EACH = 1.3, 0.42
"""Of a picture in inches: without models, and for each of them."""


class Shown(NamedTuple):
    """A picture: its file's name, and the figure."""

    name: str
    figure: "Figure"


def pictures(result: ComparisonResult) -> Iterator[Shown]:
    """The pictures that the figures of a comparison allow.

    Args:
        result: of the comparison.

    Yields:
        The change of loss, the KL (or cosine), sizes, and speeds.
    """
    others = list(result.others)
    for name, title, values in (
        ("loss", "Change of loss, nats (95 %)", [one.quality.change for one in others]),
        ("kl", "KL from the reference, nats (95 %)", [one.quality.kl for one in others]),
        ("cosine", "Cosine with the reference (95 %)", [one.quality.cosine for one in others]),
    ):
        known = [value for value in values if value is not None]
        if len(known) == len(others):
            yield Shown(name, _intervals(title, others, known, zero=name != "cosine"))
    yield from _sizes_and_speeds(result.models)


def _intervals(
    title: str, models: Sequence[ComparedModel], values: Sequence[Estimate], zero: bool
) -> "Figure":
    with style():
        figure, axes = blank(title, HEIGHT + EACH * len(models))
        places = list(range(len(models)))[::-1]
        for place, value in zip(places, values, strict=True):
            axes.plot([value.low, value.high], [place, place], color=COLOUR)
            axes.plot([value.value], [place], color=COLOUR, marker="o")
        if zero:
            axes.axvline(0, color=INK, linewidth=1)
        axes.set_yticks(places, [lettering(model.name) for model in models])
        axes.set_ylim(-0.6, len(models) - 0.4)
        axes.margins(x=0.08)
    return figure


def _sizes_and_speeds(models: Sequence[ComparedModel]) -> Iterator[Shown]:
    sizes = [None if one.bytes is None else one.bytes / 1e6 for one in models]
    yield from _bars("size", "Size on disk, MB", models, sizes)
    for name, title in (("decode", "Tokens a second, writing"), ("prefill", "Tokens a second, reading")):
        rates = [getattr(one.speed, f"{name}_tokens_per_second", None) for one in models]
        yield from _bars(name, title, models, rates)


def _bars(
    name: str, title: str, models: Sequence[ComparedModel], values: Sequence[float | None]
) -> Iterator[Shown]:
    """A bar for each model, the reference in another colour; nothing where a value is missing."""
    known = [value for value in values if value is not None]
    if len(known) < len(models):
        return
    with style():
        figure, axes = blank(title, HEIGHT + EACH * len(models))
        places = list(range(len(models)))[::-1]
        axes.barh(places, known, height=0.6, color=[OTHER, *[COLOUR] * (len(models) - 1)])
        for place, value in zip(places, known, strict=True):
            axes.annotate(f" {value:.4g}", (value, place), va="center")
        axes.set_yticks(places, [lettering(model.name) for model in models])
        axes.set_xlim(0, 1.2 * max(known))
    yield Shown(name, figure)
