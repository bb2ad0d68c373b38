"""Summary of a report: plain sentences made from its numbers.

Every sentence says what was measured; none says what ought to be. Where the data cannot answer,
the sentence is left out.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product
from typing import Final

from svdq_hf.evaluation.report.cells import Group
from svdq_hf.evaluation.report.compare import Comparison, Distance, compare
from svdq_hf.evaluation.report.rows import NAMES, Row, caveat
from svdq_hf.evaluation.report.statistics import Verdict
from svdq_hf.evaluation.report.tables import chance, listing, small

RIVALS: Final = ("awq", "spqr")  # which the paper has behind svd at high k


def sentences(group: Group, rows: Sequence[Row]) -> list[str]:
    """The sentences about the main table of a group; first what all others depend on, then the verdict."""
    first = caveat(rows)
    return [
        *([] if first is None else [first]),
        *_verdict(group, rows),
        *_closest(group, rows),
        *_certain(group, rows),
        *_against_magnitude(group, rows),
        *_rivals(group),
    ]


VERDICTS: Final = ((0.01, "next to nothing"), (0.05, "little"), (0.15, "noticeably"), (math.inf, "much"))
"""How a rise of perplexity is called, up to which share: 0.05 nats of loss are 5 %."""


def _verdict(group: Group, rows: Sequence[Row]) -> Iterator[str]:
    """What quantizing costs in perplexity: of the best row, and of the one with nothing salient."""
    known = [row for row in rows if row.loss_change is not None and math.isfinite(row.loss_change)]
    dense = next((row for row in rows if row.method == "fp32"), None)
    if group.unit != "tokens" or not known or dense is None:
        return
    told = known if group.of_presets else [min(known, key=_loss)]
    base = [row for row in known if row.method == "none" and row not in told]
    before = dense.scores["perplexity"]
    names = [row.label if group.of_presets else _names([row], []) for row in (*told, *base)]
    costs = "; ".join(_cost(row, before, name) for row, name in zip([*told, *base], names, strict=True))
    yield f"Verdict, over {dense.n} tokens: {costs}."


def _loss(row: Row) -> float:
    return math.inf if row.loss_change is None else row.loss_change


def _cost(row: Row, dense: float, name: str) -> str:
    """The cost of a row in words: its perplexity beside the dense model's."""
    rise = math.expm1(_loss(row))
    word = next(word for most, word in VERDICTS if rise < most)
    bits = "" if row.bits_per_weight is None else f", {row.bits_per_weight:.2f} bits"
    told = f"{rise:+.1%}" + ("" if rise < 0 else f", {word}")
    return f"{name}{bits}: perplexity {dense:.2f} to {dense * (1 + rise):.2f} ({told})"


def _closest(group: Group, rows: Sequence[Row]) -> Iterator[str]:
    """Which method has the smallest KL at each k."""
    protected = [row for row in rows if row.method not in NAMES and row.kl is not None]
    rivals = [[row for row in protected if row.k == k] for k in group.ks]
    winners = [min(part, key=_kl) for part in rivals if len(part) > 1]
    if winners:
        span = _span(rows, min(protected, key=_kl))
        yield f"Closest to FP32, by KL of the outputs: {_names(winners, group.ks)}.{span}"


def _span(rows: Sequence[Row], best: Row) -> str:
    base = next((row.kl for row in rows if row.method == "none"), None)
    end = "" if base is None else f"; with nothing salient it is {small(base)}"
    return f" The smallest KL is {small(best.kl)} ({_names([best], [])}){end}."


def _kl(row: Row) -> float:
    return math.inf if row.kl is None or math.isnan(row.kl) else row.kl


def _certain(group: Group, rows: Sequence[Row]) -> Iterator[str]:
    """How many rows the paired test distinguishes from FP32."""
    tested = [(row, row.against_fp32) for row in rows if row.against_fp32]
    words = _by_verdict(tested)
    same = len(words.pop("not distinguishable", []))
    told = "".join(f"; {word}: {_names(found, group.ks)}" for word, found in words.items())
    if tested:
        yield f"By right answers, {same} of {len(tested)} rows are not distinguishable from FP32{told}."


def _against_magnitude(group: Group, rows: Sequence[Row]) -> Iterator[str]:
    """Whether svd is better than magnitude, k by k: by KL, and by right answers."""
    svd = [row for row in rows if row.method == "svd"]
    words = _by_verdict([(row, row.kl_against_magnitude) for row in svd if row.kl_against_magnitude])
    if said := [f"{_names(part, group.ks)} is {_KL_ENDS[word]} magnitude" for word, part in words.items()]:
        yield f"By KL, {'; '.join(said)}."
    words = _by_verdict([(row, row.against_magnitude) for row in svd if row.against_magnitude])
    if said := [f"{_names(part, group.ks)} is {word} {_ENDS[word]}" for word, part in words.items()]:
        yield f"By right answers, {'; '.join(said)}."


_ENDS: Final[Mapping[Verdict, str]] = {
    "better": "than magnitude",
    "worse": "than magnitude",
    "not distinguishable": "from magnitude",
}


_KL_ENDS: Final[Mapping[Verdict, str]] = {
    "better": "closer to FP32 than",
    "worse": "farther from FP32 than",
    "not distinguishable": "not distinguishable from",
}


def _by_verdict(tested: Iterable[tuple[Row, Comparison | Distance]]) -> dict[Verdict, list[Row]]:
    words: dict[Verdict, list[Row]] = {}
    for row, pair in tested:
        words.setdefault(pair.verdict, []).append(row)
    return words


def _names(rows: Iterable[Row], ks: Sequence[float]) -> str:
    """Rows by name, those of one method together: `svd at k = 1 and 16`; `ks` are all that there are."""
    labels: dict[str, list[float]] = {}
    for row in rows:
        labels.setdefault(row.label, []).extend([] if row.method in NAMES else [row.k])
    return listing(f"{label}{_at(found, ks)}" for label, found in labels.items())


def _at(found: Sequence[float], ks: Sequence[float]) -> str:
    every = len(ks) > 1 and set(found) == set(ks)
    return "" if not found else " at every k" if every else f" at k = {listing(f'{k:g}' for k in found)}"


def _rivals(group: Group) -> Iterator[str]:
    """The paper's claim: at high k, svd is ahead of the scores that need data."""
    for rival, rank in product(RIVALS, sorted({cell.rank for cell in group.of("svd") if cell.rank})):
        ours = [cell for cell in group.of("svd") if cell.rank == rank]
        shared = [k for k in group.ks if any(cell.k == k for cell in ours) and group.of(rival, k)]
        if shared:
            k = shared[-1]
            pair = compare([cell for cell in ours if cell.k == k], group.of(rival, k))
            several = len({cell.rank for cell in group.of("svd")}) > 1
            if pair:
                yield _rival(rival, k, pair, f"svd, rank {rank}," if several else "svd")


def _rival(rival: str, k: float, pair: Comparison, svd: str) -> str:
    holds = "holds" if pair.verdict == "better" else "does not hold" if pair.verdict == "worse" else "is open"
    return (
        f"The paper has {svd} ahead of {rival} at high k; here at k = {k:g} that {holds}: {pair.right} to "
        f"{pair.other_right} right of {pair.n}, {pair.verdict}, p {chance(pair.p)}."
    )
