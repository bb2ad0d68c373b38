"""Run of a comparison: each model answers the same inputs, one model in memory at a time.

The reference's answers wait on disk; then, in a fresh process for each folder, loading and running are
measured. Not here: the parts (`evaluation.comparison.contestants`, `evaluation.comparison.measures`,
`evaluation.comparison.result`).
"""

import gc
import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

from svdq_hf.checkpoint.source import Source
from svdq_hf.config import SVDQConfig
from svdq_hf.core.arguments import checked_arguments
from svdq_hf.evaluation.comparison.answers import Measure, Observed, Reference
from svdq_hf.evaluation.comparison.cards import check_cards, write_cards
from svdq_hf.evaluation.comparison.contestants import Contestant, Model, entrants
from svdq_hf.evaluation.comparison.kinds import kind_of
from svdq_hf.evaluation.comparison.measures import Measuring, check_tokenizer, measure_of
from svdq_hf.evaluation.comparison.request import Choices, check
from svdq_hf.evaluation.comparison.result import ComparedModel, ComparisonResult, quality_of
from svdq_hf.evaluation.comparison.sizes import size_of
from svdq_hf.evaluation.comparison.verdict import advice, verdict

FEW = 10
"""Blocks below which an interval is itself uncertain."""

logger = logging.getLogger(__name__)


@checked_arguments(text="a text file", data="a folder", out="a folder to write")
def compare(reference: Model, *others: Model | SVDQConfig, **choices: Unpack[Choices]) -> ComparisonResult:
    """Compare models with a reference: quality, size, and what loading and running them takes.

    Args:
        reference: the model that the others are to be like: a folder, a name on the Hub, or a model.
        *others: the same; or configs, to quantize the reference with on the way. None: `SVDQConfig()`.
        **choices: text, task, data, speech, tokens, context, speed, card, out: as `svdq compare` has them;
            `Choices` of `evaluation.comparison.request` explains them.

    Returns:
        The figures with intervals, a verdict on each model, and what to try next.

    Raises:
        TypeError: an argument is of a wrong type.
        ValueError: the models cannot be compared so; the message says which, and what to do.
        ImportError: a task, or a page, without the extra `evaluate`.
    """
    return Run(entrants(reference, others), choices).result()


class Run:
    """One comparison.

    Args:
        contestants: the reference first.
        choices: of the user.
        tell: is told what is being done, in one line.
    """

    def __init__(
        self, contestants: Sequence[Contestant], choices: Choices, tell: Callable[[str], None] = logger.info
    ) -> None:
        check(choices)
        if choices.get("card"):
            check_cards(contestants)
        if choices.get("out") is not None:
            check_page()
        self.contestants, self.choices, self.tell = list(contestants), choices, tell
        self.notes = list(_notes(self.contestants[0]))

    def result(self) -> ComparisonResult:
        """Run it; temporary folders are gone afterwards."""
        with tempfile.TemporaryDirectory(prefix="svdq-compare-") as place:
            started = time.perf_counter()
            found = self._compared(Path(place))
        return self._written(replace(found, seconds=time.perf_counter() - started))

    def _written(self, found: ComparisonResult) -> ComparisonResult:
        """The result, told in cards and on a page where that was asked for."""
        out = self.choices.get("out")
        if self.choices.get("card"):
            found = replace(found, cards=write_cards(found))
        if out is not None:
            from svdq_hf.evaluation.comparison.page import PAGE, write_page

            found = replace(found, page=str(Path(out) / PAGE))
            write_page(found, out)
        return found

    def _compared(self, place: Path) -> ComparisonResult:
        kind = self._kind()
        measure = self._measure(kind, place)
        seen = self._observed(measure, place)
        found = [self._model(one, of, seen[0]) for one, of in zip(self.contestants, seen, strict=True)]
        judged = [_judged(one, found[0], measure.counted, kind) for one in found[1:]]
        about = measure.about, measure.counted, seen[0].n
        self.notes += _few(int(seen[0].block.max()) + 1)
        return ComparisonResult(*about, found[0], judged, 0.0, tuple(self.notes))

    def _model(self, one: Contestant, found: Observed, reference: Observed) -> ComparedModel:
        size, quality, speed = size_of(one), quality_of(found, reference), self._speed(one)
        return ComparedModel(one.name, one.given_folder, one.quantization, *size, quality, speed)

    def _kind(self) -> str:
        kinds = {one.name: kind_of(one.empty(), one.where) for one in self.contestants if one.is_there}
        first = self.contestants[0].name
        for name, kind in kinds.items():
            if kind != kinds[first]:
                raise ValueError(
                    f"{name} is a model of another kind ({kind}) than {first} ({kinds[first]}): they answer "
                    "different things, and cannot be compared"
                )
        return kinds[first]

    def _measure(self, kind: str, place: Path) -> Measure:
        first = self.contestants[0]
        tokenizer = first.tokenizer()
        if tokenizer is None:
            raise ValueError(
                f"{first.where}: has no tokenizer that can be loaded; save the model's own there, "
                "tokenizer.save_pretrained(folder)"
            )
        folder = place / "reference"
        folder.mkdir()
        home = None if first.source is None else first.source.folder
        measure = measure_of(Measuring(first.empty(), home, tokenizer, self.choices, Reference(folder)), kind)
        for other in self.contestants[1:]:
            if other.is_there and (found := other.tokenizer()) is not None:
                check_tokenizer(found, tokenizer, other.where, first.where)
        return measure

    def _observed(self, measure: Measure, place: Path) -> list[Observed]:
        """What is observed of each contestant; those that are to be made are made on the way."""
        found = []
        for number, one in enumerate(self.contestants):
            if one.config is not None:
                self.tell(f"{one.name}: quantizing")
                one = self.contestants[number] = one.made(self._original(place), place / f"made-{number}")
            self.tell(f"{one.name}: {measure.about}")
            found.append(self._answers(measure, one))
            gc.collect()
        return found

    def _original(self, place: Path) -> Any:
        """The reference's folder, written where the reference is in memory only."""
        first = self.contestants[0]
        if first.source is None:
            folder = place / "original"
            first.model.save_pretrained(folder)
            first.tokenizer().save_pretrained(folder)
            self.contestants[0] = first = replace(first, source=Source.resolve(folder, packed=True))
        return first.source

    def _answers(self, measure: Measure, one: Contestant) -> Observed:
        try:
            return measure(one.loaded())
        except ValueError as error:
            told = str(error)
            raise ValueError(told if told.startswith(one.where) else f"{one.where}: {told}") from error

    def _speed(self, one: Contestant) -> Any:
        if not self.choices.get("speed", True) or one.source is None:
            return None
        from svdq_hf.evaluation.speed.measure import measure_speed

        self.tell(f"{one.name}: speed and memory, in a process of its own")
        try:
            return measure_speed(one.source.folder)
        except ValueError as error:  # the quality is known already, and not to be lost
            self.notes.append(f"Speed and memory of {one.name} were not measured: {error}")
            return None


def check_page() -> None:
    """Refuse a page where the library for its pictures is not installed, before the work.

    Raises:
        ImportError: matplotlib is missing; with the remedy.
    """
    import svdq_hf.evaluation.comparison.pictures  # noqa: F401  (which says how it is installed)


def _notes(first: Contestant) -> Iterator[str]:
    if first.quantization is not None:
        yield f"The reference, {first.name}, is quantized itself; give the original first, to see its cost."


def _few(blocks: int) -> Iterator[str]:
    if blocks < FEW:
        yield f"The intervals rest on {blocks} independent parts: give a longer --text, or more --tokens."


def _judged(model: ComparedModel, reference: ComparedModel, counted: str, kind: str) -> ComparedModel:
    return replace(model, verdict=verdict(model, reference, counted), advice=advice(model, kind))
