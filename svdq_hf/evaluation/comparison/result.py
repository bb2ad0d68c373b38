"""Result of a comparison: what was measured of each model, in types that JSON has.

Not here: what the figures mean in words (`evaluation.comparison.verdict`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from svdq_hf.evaluation.comparison.answers import Observed
from svdq_hf.evaluation.comparison.statistics import Estimate, estimate


@dataclass(frozen=True)
class Flips:
    """Answers that changed (SINQ, arXiv 2509.22944, counts them).

    Attributes:
        changed: answers that are not the reference's.
        lost: right answers that became wrong.
        gained: wrong answers that became right.
    """

    changed: int
    lost: int
    gained: int


@dataclass(frozen=True)
class Quality:
    """What a model answers, beside the reference; None: does not apply.

    Attributes:
        loss: mean, in nats (a regression: squared error).
        right: share of right answers.
        change: of the loss, from the reference's.
        kl: mean KL divergence from the reference, in nats.
        same: share of positions at which the likeliest answer (an embedding's nearest sentence) stays.
        cosine: mean cosine of an embedding with the reference's.
        similarity: mean change of two sentences' similarity, without its sign.
        flips: answers that changed, where the right ones are known.
        metrics: the task's own.
    """

    loss: float | None = None
    right: float | None = None
    change: Estimate | None = None
    kl: Estimate | None = None
    same: Estimate | None = None
    cosine: Estimate | None = None
    similarity: Estimate | None = None
    flips: Flips | None = None
    metrics: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The fields, in types that JSON has."""
        return {name: _plain(value) for name, value in vars(self).items()}


@dataclass(frozen=True)
class ComparedModel:
    """One model of a comparison.

    Attributes:
        name: in tables.
        folder: where it is; None: it was made on the way, or is in memory.
        quantization: its quantization_config; None: it is dense.
        bytes: of its safetensors files; None: it is in memory.
        bits: stored bits per weight: of the quantized layers, or of a dense model's all.
        dense_share: of the bytes of a quantized folder, those that are not quantized.
        shrinks: the option that would quantize the largest of those, or nothing.
        quality: beside the reference.
        speed: of loading and running, in a fresh process; None: not measured.
        verdict: one sentence.
        advice: what to try next.
    """

    name: str
    folder: str | None
    quantization: dict[str, Any] | None
    bytes: int | None
    bits: float | None
    dense_share: float | None
    shrinks: str
    quality: Quality
    speed: Any = None
    verdict: str = ""
    advice: Sequence[str] = ()

    def to_dict(self) -> dict[str, Any]:
        """The fields, in types that JSON has."""
        return {name: _plain(value) for name, value in vars(self).items()}


@dataclass(frozen=True)
class ComparisonResult:
    """What `compare` measured.

    Attributes:
        measured_on: the inputs, in a few words.
        counted: what was scored: "tokens", "answers", "sentences".
        n: how many of them.
        reference: the first model.
        others: the others, in their order.
        seconds: that it took.
        notes: what a reader should know.
        page: the page's file; None: none was asked for.
        cards: model cards that now say the figures.
    """

    measured_on: str
    counted: str
    n: int
    reference: ComparedModel
    others: Sequence[ComparedModel]
    seconds: float
    notes: Sequence[str] = ()
    page: str | None = None
    cards: Sequence[str] = ()

    @property
    def models(self) -> list[ComparedModel]:
        """All models, the reference first."""
        return [self.reference, *self.others]

    def to_dict(self) -> dict[str, Any]:
        """The fields, in types that JSON has."""
        return {name: _plain(value) for name, value in vars(self).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Estimate):
        return value.to_dict()
    if isinstance(value, Flips):
        return dict(vars(value))
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value.to_dict() if hasattr(value, "to_dict") else value


def quality_of(found: Observed, reference: Observed) -> Quality:
    """The quality of a model, from what was observed of it and of the reference.

    Args:
        found: of the model.
        reference: of the reference, at the same positions; it may be `found` itself.
    """

    def mean(values: Tensor | None) -> Estimate | None:
        return None if values is None else estimate(values, found.block)

    change = None
    if found.loss is not None and reference.loss is not None:
        change = estimate(found.loss - reference.loss, found.block)
    return Quality(
        loss=None if found.loss is None else float(found.loss.mean()),
        right=None if found.right is None else float(found.right.double().mean()),
        change=change,
        kl=mean(found.kl),
        same=mean(found.same),
        cosine=mean(found.cosine),
        similarity=mean(found.similarity),
        flips=_flips(found, reference),
        metrics=dict(found.metrics or {}),
    )


def _flips(found: Observed, reference: Observed) -> Flips | None:
    if found.right is None or reference.right is None or found.same is None:
        return None
    before, after = reference.right, found.right
    return Flips(int((~found.same).sum()), int((before & ~after).sum()), int((~before & after).sum()))
