"""Paired comparisons of two methods over the same examples: McNemar for right answers, Student's t for KLs.

Not here: the tests as formulas (`evaluation.report.statistics`).
"""

import math
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import NamedTuple

from svdq_hf.evaluation.report.cells import Cell
from svdq_hf.evaluation.report.statistics import Verdict, mcnemar, paired_t, verdict


class Comparison(NamedTuple):
    """Result of a paired test of right answers: p, right answers of both sides, examples, verdict."""

    p: float
    right: int
    other_right: int
    n: int
    verdict: Verdict


class Distance(NamedTuple):
    """Result of a paired test of KLs: p, mean KL of both sides, examples, verdict."""

    p: float
    kl: float
    other_kl: float
    n: int
    verdict: Verdict


def compare(cells: Sequence[Cell], others: Sequence[Cell]) -> Comparison | None:
    """McNemar's test of some cells against others, paired by model and example.

    Of several random draws for one model only the first counts, since each would count the other side's
    errors again.

    Args:
        cells: of one method.
        others: of the method compared with.

    Returns:
        The result; None where no two cells pair.
    """
    paired = _paired(cells, others)
    ours = "".join(cell.correct or "" for cell, _ in paired)
    theirs = "".join(partner.correct or "" for _, partner in paired)
    if not ours or len(ours) != len(theirs):
        return None
    p, right, other_right = mcnemar(ours, theirs), ours.count("1"), theirs.count("1")
    return Comparison(p, right, other_right, len(ours), verdict(p, right, other_right))


def distance(cells: Sequence[Cell], others: Sequence[Cell]) -> Distance | None:
    """Paired t test of whose outputs are nearer to FP32's, over the same examples of the same models.

    Args:
        cells: of one method.
        others: of the method compared with.

    Returns:
        The result; None where no two cells pair, or a KL is not finite.
    """
    paired = _paired(cells, others)
    ours = [kl for cell, _ in paired for kl in cell.kl_each or ()]
    theirs = [kl for _, partner in paired for kl in partner.kl_each or ()]
    if len(ours) < 2 or len(ours) != len(theirs) or not all(map(math.isfinite, ours + theirs)):
        return None
    p, kl, other_kl = paired_t(ours, theirs), fmean(ours), fmean(theirs)
    return Distance(p, kl, other_kl, len(ours), verdict(p, other_kl, kl))


def _paired(cells: Sequence[Cell], others: Sequence[Cell]) -> list[tuple[Cell, Cell]]:
    """The first draw of each model, with its partner among the others."""
    first = [min(part, key=lambda cell: cell.score_seed or 0) for part in by_model(cells)]
    return [(cell, partner) for cell in first if (partner := partner_of(cell, others))]


def partner_of(cell: Cell, others: Iterable[Cell]) -> Cell | None:
    """The other method's cell of the same model, preferably of the same draw and rank; or None."""
    same = [other for other in others if (other.model, other.model_seed) == (cell.model, cell.model_seed)]
    near = (cell.score_seed, cell.rank)
    closest = sorted(same, key=lambda other: (other.score_seed != near[0], other.rank != near[1]))
    return closest[0] if closest else None


def by_model(cells: Iterable[Cell]) -> list[list[Cell]]:
    """The cells grouped by model, in order of first appearance."""
    parts: dict[tuple[str, int | None], list[Cell]] = {}
    for cell in cells:
        parts.setdefault((cell.model, cell.model_seed), []).append(cell)
    return list(parts.values())


def mean(values: Iterable[float | None]) -> float | None:
    """Mean of the values that are not None; None where all are."""
    known = [value for value in values if value is not None]
    return fmean(known) if known else None
