"""Rows of the report's tables: cells pooled over seeds, compared with each other and with FP32.

Several models (seeds) of one kind are pooled: their right answers are added up, their scores averaged. The
dev examples are then counted once per seed, so intervals and p-values come out somewhat too narrow; the
tables say so, and give the spread over seeds beside them. Not here: columns and texts
(`evaluation.report.columns`).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Final

from svdq_hf.evaluation.report.cells import Cell, Group, Overlap, in_order
from svdq_hf.evaluation.report.compare import (
    Comparison,
    Distance,
    by_model,
    compare,
    distance,
    mean,
    partner_of,
)
from svdq_hf.evaluation.report.statistics import Band, Interval, confidence_band, wilson

NAMES: Final = {"fp32": "FP32", "none": "4-bit, nothing salient"}
PAPER_OVERLAP: Final = (0.60, 0.70)  # arXiv 2512.01343: "60-70 %" of svd's choice is spqr's as well


@dataclass(frozen=True)
class Row:
    """One method at one k, pooled over model seeds and draws; None where a field does not apply."""

    method: str
    label: str
    k: float
    rank: int | None
    runs: int
    seeds: int
    n: int
    right: int | None
    scores: Mapping[str, float]
    interval: Interval | None
    band: Band | None
    against_fp32: Comparison | None
    against_magnitude: Comparison | None
    kl_against_magnitude: Distance | None
    majority: float | None
    kl: float | None
    loss_change: float | None
    bits_per_weight: float | None

    def record(self) -> dict[str, object]:
        """All fields as one flat dict, for a line of CSV."""
        flat = {name: value for name, value in asdict(self).items() if name not in _NESTED}
        scores = dict(self.scores)
        low, high = self.interval or (None, None)
        _, band_low, band_high = self.band or (None, None, None)
        ends = {"wilson_low": low, "wilson_high": high, "seeds_low": band_low, "seeds_high": band_high}
        pairs = {"fp32": self.against_fp32, "magnitude": self.against_magnitude}
        tests = {f"p_{name}": pair.p if pair else None for name, pair in pairs.items()}
        words = {f"verdict_{name}": pair.verdict if pair else None for name, pair in pairs.items()}
        distance = self.kl_against_magnitude
        tests |= {"p_kl_magnitude": distance.p if distance else None}
        words |= {"verdict_kl_magnitude": distance.verdict if distance else None}
        return flat | scores | ends | tests | words


_NESTED: Final = (
    "scores", "interval", "band", "against_fp32", "against_magnitude", "kl_against_magnitude", "majority",
)  # fmt: skip


@dataclass(frozen=True)
class OverlapRow:
    """Overlap of svd's choice, at one rank, with another score's at one k, over layers (and models)."""

    other: str
    rank: int
    k: float
    layers: int
    iou: float
    share: float
    chance: float
    low: float
    high: float

    @property
    def claim(self) -> str | None:
        """Whether the share is the one that the paper claims; None for other scores than spqr."""
        if self.other != "spqr":
            return None
        low, high = PAPER_OVERLAP
        return "hit" if low <= self.share <= high else f"miss, {'below' if self.share < low else 'above'}"


def main_rows(group: Group) -> list[Row]:
    """Rows of the main table: FP32, nothing salient, then each method by k."""
    found = [_row(group, cells) for cells in _pools(group)]
    if group.of_presets:  # whose ks say nothing beside each other
        return found
    baselines = [row for row in found if row.method in NAMES]
    return baselines + sorted((row for row in found if row.method not in NAMES), key=lambda row: row.k)


def overlap_rows(overlaps: Iterable[Overlap]) -> list[OverlapRow]:
    """Rows of the overlap table: one per other score, rank and k, over all layers."""
    pools: dict[tuple[str, int, float], list[Overlap]] = {}
    for overlap in overlaps:
        pools.setdefault((overlap.other, overlap.rank, overlap.k), []).append(overlap)
    others = in_order(other for other, _, _ in pools)
    keys = sorted(pools, key=lambda key: (others.index(key[0]), *key[1:]))
    return [_overlap_row(pools[key]) for key in keys]


def _share(counts: Sequence[int | None], n: int) -> float | None:
    known = [count for count in counts if count is not None]
    return sum(known) / n if len(known) == len(counts) else None


def missing(group: Group, rows: Sequence[Row]) -> list[str]:
    """Notes on what the data lacks: baselines, some of the ks, some of the seeds."""
    there = set(group.methods)
    wanted = _BASELINES[:1] if group.of_presets else _BASELINES
    notes = [f"No row {NAMES.get(name, name)}: not in the data." for name in wanted if name not in there]
    for method in ("magnitude", "random"):
        ks = [k for k in group.ks if not group.of(method, k)]
        if method in there and ks:
            notes.append(f"No row {method} at k = {', '.join(f'{k:g}' for k in ks)}: not in the data.")
    most = max(row.seeds for row in rows)
    return notes + [
        f"{row.label} at k = {row.k:g} has {row.seeds} of {most} models." for row in rows if row.seeds < most
    ]


def caveat(rows: Sequence[Row]) -> str | None:
    """The sentence that comes before all others: where the dense model itself has learnt nothing."""
    dense = next((row for row in rows if row.method == "fp32"), None)
    if dense and dense.interval and dense.majority and dense.interval.low <= dense.majority:
        return (
            "Caveat: FP32 itself is not distinguishable from always giving the commonest answer "
            f"({dense.majority:.1%} right): right answers rank nothing here, KL does."
        )
    return None


_BASELINES: Final = ("fp32", "none", "magnitude", "random")


def _pools(group: Group) -> list[list[Cell]]:
    """Cells that differ only in their seeds, pooled, in the order of the methods."""
    pools: dict[tuple[str, float, int | None], list[Cell]] = {}
    for cell in sorted(group.cells, key=lambda cell: group.methods.index(cell.method)):
        pools.setdefault((cell.method, cell.k, cell.rank), []).append(cell)
    return list(pools.values())


def _row(group: Group, cells: Sequence[Cell]) -> Row:
    first = cells[0]
    counted = [cell.right for cell in cells if cell.right is not None]
    n = sum(cell.n for cell in cells)
    seeds = len(by_model(cells))
    right = sum(counted) if len(counted) == len(cells) else None
    salient = first.method not in (*NAMES, "magnitude")
    return Row(
        method=first.method,
        label=_label(group, first),
        k=first.k,
        rank=first.rank,
        runs=len(cells),
        seeds=seeds,
        n=n,
        right=right,
        scores=_scores(group, cells),
        interval=None if right is None else _interval(right, n, len(cells) // seeds),
        band=_band(group, cells),
        against_fp32=compare(cells, group.of("fp32")) if first.method != "fp32" else None,
        against_magnitude=compare(cells, group.of("magnitude", first.k)) if salient else None,
        kl_against_magnitude=distance(cells, group.of("magnitude", first.k)) if salient else None,
        majority=_share([cell.majority for cell in cells], n),
        kl=mean(cell.kl for cell in cells),
        loss_change=_loss_change(cells, group.of("fp32")) if first.method != "fp32" else None,
        bits_per_weight=mean(cell.bits_per_weight for cell in cells),
    )


def _interval(right: int, n: int, draws: int) -> Interval:
    """Wilson's interval, as wide as for one draw per model: more draws answer no more examples."""
    return wilson(round(right / draws), n // draws)


def _label(group: Group, cell: Cell) -> str:
    ranks = {other.rank for other in group.of(cell.method)}
    name = NAMES.get(cell.method, cell.method)
    return f"{name}, rank {cell.rank}" if len(ranks) > 1 else name


def _scores(group: Group, cells: Sequence[Cell]) -> dict[str, float]:
    means = {name: mean(cell.metrics.get(name) for cell in cells) for name in group.metrics}
    return {name: value for name, value in means.items() if value is not None}


def _band(group: Group, cells: Sequence[Cell]) -> Band | None:
    """Spread of the headline over models (draws of one model averaged), or over draws of a single model."""
    values = [
        [cell.metrics[group.headline] for cell in part if group.headline in cell.metrics]
        for part in by_model(cells)
    ]
    if len(values) == 1:
        values = [[value] for value in values[0]]
    known = [fmean(part) for part in values if part]
    return confidence_band(known) if len(known) > 1 and all(map(math.isfinite, known)) else None


def _loss_change(cells: Iterable[Cell], dense: Sequence[Cell]) -> float | None:
    pairs = [(cell.loss, partner.loss) for cell in cells if (partner := partner_of(cell, dense))]
    return mean(loss - base for loss, base in pairs if loss is not None and base is not None)


def _overlap_row(overlaps: Sequence[Overlap]) -> OverlapRow:
    first, shares = overlaps[0], [overlap.share for overlap in overlaps]
    return OverlapRow(
        other=first.other,
        rank=first.rank,
        k=first.k,
        layers=len({overlap.layer for overlap in overlaps}),
        iou=fmean(overlap.iou for overlap in overlaps),
        share=fmean(shares),
        chance=fmean(overlap.chance for overlap in overlaps),
        low=min(shares),
        high=max(shares),
    )
