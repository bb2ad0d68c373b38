"""Model cards of compared folders, which say how the quantized model's quality was measured.

Not here: the card's text (`hub.measured`).
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from svdq_hf.config.choices import QUANT_METHOD
from svdq_hf.core.release import VERSION
from svdq_hf.evaluation.comparison.contestants import Contestant
from svdq_hf.evaluation.comparison.result import ComparedModel, ComparisonResult
from svdq_hf.evaluation.comparison.statistics import Estimate
from svdq_hf.evaluation.comparison.table import same_title
from svdq_hf.evaluation.comparison.verdict import figure, share, signed
from svdq_hf.hub.card import write_card
from svdq_hf.hub.measured import remember, with_measured
from svdq_hf.hub.readme import README, merge, read_text, section_of


def check_cards(contestants: Sequence[Contestant]) -> None:
    """Refuse a comparison for cards in which no folder has one.

    Args:
        contestants: the reference first.

    Raises:
        ValueError: none of the others is a folder quantized by svdq.
    """
    if not any(one.given_folder and _is_ours(one.quantization) for one in contestants[1:]):
        raise ValueError(
            "--card: none of the compared models is a folder quantized by svdq, whose card could say it; "
            "write one first: svdq quantize MODEL OUT"
        )


def _is_ours(quantization: dict[str, Any] | None) -> bool:
    return quantization is not None and quantization.get("quant_method") == QUANT_METHOD


def write_cards(result: ComparisonResult) -> list[str]:
    """Write what was measured into the README.md of each quantized folder; its user's text is kept.

    Args:
        result: of the comparison.

    Returns:
        The files written.
    """
    given = [one for one in result.others if one.folder is not None and _is_ours(one.quantization)]
    return [_write(one, result) for one in given]


def _write(model: ComparedModel, result: ComparisonResult) -> str:
    folder = Path(str(model.folder))
    remember(
        folder,
        {
            "reference": result.reference.name,
            "measured_on": result.measured_on,
            "figures": dict(_figures(model, result)),
            "values": model.quality.to_dict(),
        },
    )
    file = folder / README
    text = read_text(file)
    if not section_of(text):
        write_card(folder)
    else:
        file.write_bytes(merge(text, {}, with_measured(section_of(text), folder)).encode())
    return str(file)


def _figures(model: ComparedModel, result: ComparisonResult) -> Iterator[tuple[str, str]]:
    quality = model.quality
    yield f"scored {result.counted}", f"{result.n}"
    if quality.change is not None:
        yield "change of loss", f"{_with_ends(quality.change, signed)} nats"
    if quality.kl is not None:
        yield "mean KL", f"{_with_ends(quality.kl, figure)} nats"
    if quality.cosine is not None:
        yield "mean cosine", _with_ends(quality.cosine, lambda value: f"{value:.4f}")
    if quality.same is not None:
        yield same_title(result.counted), share(quality.same)
    if quality.flips is not None and result.counted == "answers":
        lost, gained = quality.flips.lost, quality.flips.gained
        yield "answers changed", f"{quality.flips.changed}: {lost} right to wrong, {gained} wrong to right"
    yield "measured by", f"svdq compare {VERSION}"


def _with_ends(one: Estimate, shown: Any) -> str:
    return f"{shown(one.value)} (95 %: {shown(one.low)} to {shown(one.high)})"
