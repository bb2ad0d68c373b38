"""Table of a comparison: a row for each quantity, a column for each model, so that it fits a narrow terminal.

Not here: how it is drawn (`cli.compare`, `evaluation.comparison.page`).
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from svdq_hf.checkpoint.streaming.byte_ranges import readable
from svdq_hf.evaluation.comparison.result import ComparedModel, ComparisonResult
from svdq_hf.evaluation.comparison.statistics import Estimate
from svdq_hf.evaluation.comparison.verdict import figure, share, signed

ABSENT = "-"
ANSWERS = "answers"


class Row(NamedTuple):
    """A quantity: its title, and its text for each model, the reference first."""

    title: str
    texts: list[str]


Text = Callable[[ComparedModel], str | None]


def rows(result: ComparisonResult) -> list[Row]:
    """The rows of which any model has a value.

    Args:
        result: of the comparison.
    """
    made = [Row(title, [text(model) or ABSENT for model in result.models]) for title, text in _all(result)]
    return [row for row in made if any(text != ABSENT for text in row.texts)]


def _all(result: ComparisonResult) -> Iterator[tuple[str, Text]]:
    yield from _sizes()
    yield from _speeds()
    yield "loss", lambda model: None if model.quality.loss is None else f"{model.quality.loss:.3f}"
    for name in result.reference.quality.metrics:
        yield name.replace("_", " "), _metric(name)
    first = result.reference
    yield from ((title, _of_others(first, text)) for title, text in _qualities(result))


def _metric(name: str) -> Text:
    return lambda model: f"{model.quality.metrics[name]:.4f}"


def _of_others(first: ComparedModel, text: Text) -> Text:
    """A quantity beside the reference, which has none."""
    return lambda model: None if model is first else text(model)


def _sizes() -> Iterator[tuple[str, Text]]:
    yield "size on disk", lambda model: None if model.bytes is None else readable(model.bytes)
    yield "bits per weight", lambda model: None if model.bits is None else f"{model.bits:.2f}"


def _speeds() -> Iterator[tuple[str, Text]]:
    yield "load, seconds", _speed("load_seconds", lambda value: f"{value:.1f}")
    yield "peak, loading", _speed("load_peak_bytes", lambda value: readable(round(value)))
    yield "peak, running", _speed("run_peak_bytes", lambda value: readable(round(value)))
    yield "prefill, tokens/s", _speed("prefill_tokens_per_second", _rate)
    yield "decode, tokens/s", _speed("decode_tokens_per_second", _rate)


def _speed(name: str, shown: Callable[[float], str]) -> Text:
    def text(model: ComparedModel) -> str | None:
        value = getattr(model.speed, name, None)
        return None if value is None else shown(value)

    return text


def _rate(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _qualities(result: ComparisonResult) -> Iterator[tuple[str, Text]]:
    yield from _estimate("change of loss", "change", signed)
    yield from _estimate("mean KL", "kl", figure)
    yield from _estimate("mean cosine", "cosine", lambda value: f"{value:.4f}")
    yield "similarity off by", _part("similarity", "value", figure)
    yield same_title(result.counted), lambda model: _share(model.quality.same)
    if result.counted == ANSWERS:
        yield "answers changed", lambda model: _flip(model, "changed")
        yield "  right to wrong", lambda model: _flip(model, "lost")
        yield "  wrong to right", lambda model: _flip(model, "gained")


def _estimate(title: str, name: str, shown: Callable[[float], str]) -> Iterator[tuple[str, Text]]:
    """An estimate in three rows: narrow columns have no room for both ends in one."""
    yield title, _part(name, "value", shown)
    yield "  95 %: from", _part(name, "low", shown)
    yield "  to", _part(name, "high", shown)


def _part(name: str, part: str, shown: Callable[[float], str]) -> Text:
    def text(model: ComparedModel) -> str | None:
        one = getattr(model.quality, name)
        return None if one is None else shown(getattr(one, part))

    return text


def same_title(counted: str) -> str:
    """Title of the row that says how often the likeliest answer stays."""
    titles = {
        ANSWERS: "same answer",
        "labels": "same label",
        "sentences": "same nearest",
        "frames": "same top answer",
    }
    return titles.get(counted, "same top token")


def _share(one: Estimate | None) -> str | None:
    return None if one is None else share(one)


def _flip(model: ComparedModel, name: str) -> str | None:
    return None if model.quality.flips is None else str(getattr(model.quality.flips, name))
