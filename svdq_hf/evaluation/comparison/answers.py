"""Answers of two models on the same inputs, position by position: loss, divergence, agreement.

The first model that answers is the reference; its log-probabilities go to a folder on disk, so that no two
models are in memory together. Not here: which inputs (`evaluation.comparison.windows` and its neighbours),
and what the numbers amount to (`evaluation.comparison.statistics`).
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from svdq_hf.evaluation.comparison.log_probabilities import divergences_and_agreement, log_probabilities
from svdq_hf.format.files import full_disk_named

BLOCK = 64
"""Positions of a text that are resampled together, since neighbours are alike: 4096 tokens are 64 blocks."""


class Answers(NamedTuple):
    """What a model answers to one input.

    Attributes:
        logits: `[positions, classes]`.
        wanted: `[positions]`, int64, the right answers; None: not known.
        block: positions that are resampled together.
    """

    logits: Tensor
    wanted: Tensor | None
    block: int = BLOCK


@dataclass(frozen=True)
class Observed:
    """What was observed of a model, a value for each scored position `[n]`; None: does not apply.

    Attributes:
        block: number of the block that the position belongs to, int64; blocks are resampled.
        loss: float64, in nats (a regression: squared error).
        right: whether the likeliest answer is right.
        kl: KL divergence from the reference, float64, in nats.
        same: whether the likeliest answer, or the nearest sentence, is the reference's.
        cosine: of an embedding with the reference's, float64.
        similarity: mean change of a sentence's similarity to the others, float64, without its sign.
        metrics: the task's own metrics.
    """

    block: Tensor
    loss: Tensor | None = None
    right: Tensor | None = None
    kl: Tensor | None = None
    same: Tensor | None = None
    cosine: Tensor | None = None
    similarity: Tensor | None = None
    metrics: dict[str, float] | None = None

    @property
    def n(self) -> int:
        """Scored positions."""
        return self.block.numel()


class Measure(Protocol):
    """Inputs that models are compared on: called with the reference first, then with the others.

    Attributes:
        about: what they are, in a few words.
        counted: what a position is: "tokens", "answers", "sentences".
    """

    about: str
    counted: str

    def __call__(self, model: Any) -> Observed:
        """What a model answers, beside the reference where there is one already."""


class Reference:
    """The reference's answers, in a folder; it is complete when the first model has answered all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.complete = False

    def observe(self, answers: Iterable[Answers]) -> Observed:
        """Observe one model.

        Args:
            answers: of the model, input by input, in the same order each time.

        Raises:
            ValueError: a NaN, or another number of classes than the reference has.
        """
        parts, blocks = [], 0
        for place, one in enumerate(answers):
            parts.append(self._part(place, one, blocks))
            blocks = int(parts[-1].block[-1]) + 1
        self.complete = True
        return joined(parts)

    def keep(self, place: int, value: Tensor) -> None:
        """Write what is to be known of the reference's answer to one input, `[positions, classes]`."""
        with full_disk_named(self.folder):
            save_file({"value": value.contiguous()}, self._file(place))

    def known(self, place: int) -> Tensor:
        """The reference's answer to one input, `[positions, classes]`, as it was kept."""
        value: Tensor = load_file(self._file(place))["value"]
        return value

    def _file(self, place: int) -> Path:
        return self.folder / f"{place}.safetensors"

    def _part(self, place: int, one: Answers, blocks: int) -> Observed:
        if torch.isnan(one.logits).any():
            raise ValueError("its answers have a NaN; is it damaged, or in too narrow a dtype?")
        if self.complete:
            known = self.known(place)
            check_same_size(known, one.logits)
            kl, same = divergences_and_agreement(known, one.logits)
        else:
            self.keep(place, log_probabilities(one.logits))
            n = len(one.logits)
            kl, same = torch.zeros(n, dtype=torch.float64), torch.ones(n, dtype=torch.bool)
        loss, right = _scored(one)
        return Observed(blocks + torch.arange(len(kl)) // one.block, loss, right, kl, same)


def check_same_size(known: Tensor, found: Tensor) -> None:
    """Refuse answers `[positions, classes]` of another shape than the reference's.

    Raises:
        ValueError: it says both numbers of classes.
    """
    if known.shape != found.shape:
        raise ValueError(
            f"it chooses among {found.shape[-1]} answers, the reference among {known.shape[-1]}: only models "
            "of one vocabulary (or one set of labels) can be compared"
        )


def _scored(one: Answers) -> tuple[Tensor | None, Tensor | None]:
    """Loss and rightness of each position."""
    if one.wanted is None:
        return None, None
    losses = [
        F.cross_entropy(part.float(), wanted, reduction="none")
        for part, wanted in zip(torch.split(one.logits, BLOCK), torch.split(one.wanted, BLOCK), strict=True)
    ]
    return torch.cat(losses).double(), one.logits.argmax(-1) == one.wanted


def joined(parts: list[Observed]) -> Observed:
    """Observations of several inputs as one.

    Raises:
        ValueError: there is none.
    """
    if not parts:
        raise ValueError("nothing was scored: the text is too short")

    def column(name: str) -> Tensor | None:
        values = [getattr(part, name) for part in parts]
        return None if values[0] is None else torch.cat(values)

    names = [one.name for one in fields(Observed) if one.name not in ("block", "metrics")]
    columns: dict[str, Any] = {name: column(name) for name in names}
    return Observed(torch.cat([part.block for part in parts]), **columns)


def run_over(model: Any, inputs: Iterable[Any], answer: Callable[[Any, Any], Answers]) -> Iterator[Answers]:
    """The answers of a model, one input at a time.

    Args:
        model: the model.
        inputs: of any kind.
        answer: runs the model on one of them.

    Yields:
        What it answers.
    """
    for one in inputs:
        with torch.no_grad():
            yield answer(model, one)
