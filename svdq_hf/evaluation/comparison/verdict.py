"""Verdict on one model of a comparison: what it loses and saves, and what to try next.

The words for a KL are a convention. What they go by is the quality page: on Gemma 3 270M 4 bits are at 0.10
by `best()` and at 0.28 by NF4. Not here: the figures (`evaluation.comparison.result`).
"""

from collections.abc import Iterator

from svdq_hf.config import SVDQConfig
from svdq_hf.config.choices import QUANT_METHOD
from svdq_hf.config.presets import PRESETS
from svdq_hf.evaluation.comparison.kinds import OF_SPEECH
from svdq_hf.evaluation.comparison.labels import preset_of
from svdq_hf.evaluation.comparison.result import ComparedModel, Quality
from svdq_hf.evaluation.comparison.statistics import Estimate
from svdq_hf.evaluation.report.tables import listing

LEVELS = (
    (0.002, "hardly to be told from the original"),
    (0.02, "very close to the original"),
    (0.15, "close to the original"),
    (0.5, "noticeably different from the original"),
    (float("inf"), "far from the original"),
)
"""Words for a mean KL in nats below each bound."""
COSINES = ((0.001, 0), (0.005, 1), (0.03, 2), (0.1, 3), (float("inf"), 4))
"""The same words, for 1 minus a mean cosine below each bound."""
MOSTLY_DENSE = 0.5
FEW_BITS = 5.0


def verdict(model: ComparedModel, reference: ComparedModel, counted: str) -> str:
    """One or two sentences on a model: what it loses, and what it saves.

    Args:
        model: not the reference.
        reference: the first model.
        counted: what was scored: "tokens", "answers", ...
    """
    quality = model.quality
    facts = ", ".join([*_loss(quality), *_distance(quality), *_agreement(quality, counted)])
    return f"{model.name} {facts}: {closeness(quality)}.{_saved(model, reference)}"


def _saved(model: ComparedModel, reference: ComparedModel) -> str:
    """Size, memory and speed beside the reference's, in a sentence; nothing where none is known."""
    shares = {"disk": _ratio(model.bytes, reference.bytes)}
    shares["memory"] = _ratio(*(getattr(one.speed, "run_peak_bytes", None) for one in (model, reference)))
    faster = _ratio(*(getattr(one.speed, "decode_tokens_per_second", None) for one in (model, reference)))
    takes = [f"{value:.2f} of the {what}" for what, value in shares.items() if value is not None]
    told = [f"takes {listing(takes)}"] if takes else []
    told += [f"writes {faster:.2f} times as fast"] if faster is not None else []
    return f" It {', and '.join(told)}." if told else ""


def _ratio(ours: float | None, theirs: float | None) -> float | None:
    return ours / theirs if ours and theirs else None


def closeness(quality: Quality) -> str:
    """How near a model is to the original, in words."""
    if is_identical(quality):
        return "the same answers"
    if quality.cosine is not None:
        return LEVELS[next(at for bound, at in COSINES if 1 - quality.cosine.value < bound)][1]
    if quality.kl is None:
        return "see the change of the loss"
    known = quality.kl.value
    return next((words for bound, words in LEVELS if known < bound), LEVELS[-1][1])


def is_identical(quality: Quality) -> bool:
    """Whether nothing at all has changed."""
    if quality.cosine is not None:
        return quality.cosine.value > 1 - 1e-9
    if quality.kl is not None:
        return quality.kl.value == 0
    return quality.change is not None and quality.change[:] == (0, 0, 0)


def _loss(quality: Quality) -> Iterator[str]:
    if quality.change is not None:
        low, high = signed(quality.change.low), signed(quality.change.high)
        yield f"changes the loss by {signed(quality.change.value)} nats ({low} to {high})"


def _distance(quality: Quality) -> Iterator[str]:
    if quality.kl is not None:
        yield f"{'is at ' if quality.change is None else ''}KL {figure(quality.kl.value)}"
    if quality.cosine is not None:
        yield f"keeps a cosine of {quality.cosine.value:.4f}"


def _agreement(quality: Quality, counted: str) -> Iterator[str]:
    if quality.flips is not None and counted == "answers":
        changed, lost, gained = quality.flips.changed, quality.flips.lost, quality.flips.gained
        yield f"{changed} answers changed ({lost} right to wrong, {gained} wrong to right)"
    elif quality.same is not None:
        what = {"labels": "labels", "sentences": "nearest sentences", "frames": "top answers"}
        yield f"{share(quality.same)} of {what.get(counted, 'top tokens')} stay"


def signed(value: float) -> str:
    """A change of loss.

    >>> signed(0.04812), signed(-0.0004)
    ('+0.048', '-0.0004')
    """
    return f"{value:+.3f}" if abs(value) >= 0.0095 or value == 0 else f"{value:+.2g}"


def figure(value: float) -> str:
    """A number of any size, three digits.

    >>> figure(0.1), figure(0.0), figure(0.0000123), figure(100.0)
    ('0.100', '0', '1.23e-05', '100')
    """
    return f"{value:#.3g}".rstrip(".") if value else "0"


def share(value: Estimate) -> str:
    """A share in per cent; only all is 100.

    >>> share(Estimate(0.9996, 0, 1)), share(Estimate(1.0, 1, 1)), share(Estimate(0.96, 0, 1))
    ('99.96 %', '100 %', '96.0 %')
    """
    percent = 100 * value.value
    return "100 %" if percent == 100 else f"{percent:.1f} %" if percent < 99.9 else f"{percent:.2f} %"


def advice(model: ComparedModel, kind: str = "") -> list[str]:
    """What to try next, at most two hints.

    Args:
        model: not the reference.
        kind: of the models, see `kinds.kind_of`.
    """
    known = model.quantization or {}
    if is_identical(model.quality) or known.get("quant_method") != QUANT_METHOD:
        return []
    config = SVDQConfig.from_dict(known)
    close = closeness(model.quality) in {words for _, words in LEVELS[:2]}
    return [*(_smaller(config) if close else _nearer(config, kind)), *_mostly_dense(model)]


def _smaller(config: SVDQConfig) -> Iterator[str]:
    if config.bits > FEW_BITS:
        yield "smaller: --preset best, of 4 bits"
    elif preset_of(config) == "self_calibrated":
        yield "smaller: --preset self_calibrated --k 0.0009 --group-size 64"
    elif config.bits == SVDQConfig().bits and config.activations is None and _has_finer_scales(config):
        yield "smaller: --preset small"


def _has_finer_scales(config: SVDQConfig) -> bool:
    """Whether groups are smaller than those of the preset `small`."""
    coarse = PRESETS["small"].changes["group_size"]
    return isinstance(config.group_size, int) and config.group_size < coarse


def _nearer(config: SVDQConfig, kind: str) -> Iterator[str]:
    if preset_of(config) == "paper":
        yield "nearer: --preset best; the preset paper is only for comparisons with the paper"
    elif config.bits < FEW_BITS:
        more = "--bits 4" if config.bits < SVDQConfig().bits else "--bits 8"
        yield f"nearer: {'; '.join([*_ways(config, kind), more])}"


def _ways(config: SVDQConfig, kind: str) -> Iterator[str]:
    """Ways to come nearer at about the same bits; what follows the loss is as near as is known."""
    if config.follows_loss:
        return
    if not config.data_needs and preset_of(config) != "best":
        yield "--preset best"
    if kind == "causal":
        yield "in minutes to hours, --preset self_calibrated"
    elif kind not in OF_SPEECH and not config.error_feedback:
        yield "with texts of yours, svdq quantize --preset calibrated"


def _mostly_dense(model: ComparedModel) -> Iterator[str]:
    dense = model.dense_share or 0
    if dense > MOSTLY_DENSE and model.shrinks:
        yield f"{100 * dense:.0f} % of the file is not quantized: {model.shrinks} shrinks it"
