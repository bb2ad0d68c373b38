"""The three tables of a report: the main table of a group, the overlaps, and every run by itself.

Only which columns there are, their titles and the notes beside them. Not here: the numbers
(`evaluation.report.rows`).
"""

from collections.abc import Iterable, Sequence
from typing import Final

from svdq_hf.evaluation.report.cells import Cell, Group
from svdq_hf.evaluation.report.compare import Comparison, Distance
from svdq_hf.evaluation.report.rows import NAMES, OverlapRow, Row, missing
from svdq_hf.evaluation.report.statistics import SIGNIFICANCE
from svdq_hf.evaluation.report.tables import ABSENT, Column, Table, chance, change, listing, number, small


def main_table(group: Group, rows: Sequence[Row]) -> Table:
    """The table of one group: what each method costs at each k."""
    columns = _main_columns(group, rows)
    return Table(
        name="main",
        titles=[column.title for column in columns],
        entries=[[column.entry(row) for column in columns] for row in rows],
        caption=_caption(group, rows),
        notes=missing(group, rows),
        records=[row.record() for row in rows],
    )


def overlap_table(rows: Sequence[OverlapRow]) -> Table:
    """How much of svd's choice other scores make as well."""
    return Table(
        name="overlap",
        titles=[column.title for column in _OVERLAP],
        entries=[[column.entry(row) for column in _OVERLAP] for row in rows],
        caption=(
            "Share: of svd's k weights in a layer, those that the other score chooses too; IoU: those over "
            "all that either chooses; both are means over layers. Chance: the share of a blind choice."
        ),
        notes=claims(rows),
        records=[{**vars(row), "claim": row.claim} for row in rows],
    )


def runs_table(group: Group) -> Table:
    """Every cell by itself, not pooled."""
    cells = sorted(group.cells, key=lambda cell: (group.methods.index(cell.method), cell.k))
    columns = [column for column in _run_columns(group) if any(column.sort(c) is not None for c in cells)]
    return Table(
        name="runs",
        titles=[column.title for column in columns],
        entries=[[column.entry(cell) for column in columns] for cell in cells],
        caption="Every run by itself. Seconds: quantizing, evaluating.",
        records=[_run_record(cell) for cell in cells],
    )


def claims(rows: Iterable[OverlapRow]) -> list[str]:
    """The paper's claim about the overlap with spqr, compared with the data: one sentence, or none."""
    words: dict[str, list[str]] = {}
    rows = list(rows)
    ranks = {row.rank for row in rows}
    for row in rows:
        if row.claim:
            at = f"{row.k:g}" if len(ranks) == 1 else f"{row.k:g}, rank {row.rank}"
            words.setdefault(row.claim, []).append(f"{at} ({row.share:.1%}, IoU {row.iou:.2f})")
    found = "; ".join(f"{claim}: k = {listing(ks)}" for claim, ks in words.items())
    return [f"The paper says 60-70 % with spqr, of the mean share here: {found}."] if found else []


def setting(group: Group) -> str:
    """A group in one line: task, model, grid, seeds, examples or tokens."""
    seeds = sorted({cell.model_seed for cell in group.cells if cell.model_seed is not None})
    models = f"model seeds {', '.join(map(str, seeds))}" if len(seeds) > 1 else ""
    parts = [group.task, group.family, group.grid or "", models, f"{group.cells[0].n} {group.unit}"]
    return "; ".join(part for part in parts if part)


def _caption(group: Group, rows: Sequence[Row]) -> str:
    pooled = any(row.runs > 1 for row in rows)
    lines = [f"{setting(group)}."]
    if pooled:
        lines.append("Scores, KL and change of loss are means over models, and over the draws of random.")
    if pooled and group.counts_right:
        lines.append("Right answers are summed; intervals and tests pool the models, with one draw each.")
    if group.counts_right and any(row.seeds > 1 for row in rows):
        lines.append("That counts each example once per model: intervals come out narrow, p-values small.")
    if group.counts_right:
        lines.append(_about_tests(rows))
    return " ".join(lines)


def _about_tests(rows: Sequence[Row]) -> str:
    tests = sum(
        pair is not None
        for row in rows
        for pair in (row.against_fp32, row.against_magnitude, row.kl_against_magnitude)
    )
    return (
        "p: exact McNemar over the same examples, against magnitude at the same k; of KLs, a paired t test "
        "over the same examples; two-sided. "
        f"Of {tests} tests at {SIGNIFICANCE:.0%}, about {SIGNIFICANCE * tests:.1f} would come out by chance."
    )


def _main_columns(group: Group, rows: Sequence[Row]) -> list[Column[Row]]:
    always: list[Column[Row]] = [
        Column("method", lambda row: row.label, lambda row: row.label),
        Column("k", lambda row: ABSENT if row.method in NAMES else f"{row.k:g}", lambda row: row.k),
    ]
    scores = [_score(name) for name in group.metrics]
    seeds = [_SEEDS] if any(row.band for row in rows) else []
    tests = [column for column in _TESTS if any(column.sort(row) is not None for row in rows)]
    right, tests = ([_RIGHT], [_WILSON, *tests]) if group.counts_right else ([], [])
    loss = "change of loss (nats)" if "perplexity" in group.metrics else "change of loss"
    costs: list[Column[Row]] = [  # first: on a phone what is on the right is scrolled away
        Column(
            "bits per weight", lambda row: number(row.bits_per_weight, 2), lambda row: row.bits_per_weight
        ),
        Column(loss, lambda row: change(row.loss_change), lambda row: row.loss_change),
        Column("KL from FP32", lambda row: small(row.kl), lambda row: row.kl),
    ]
    against = [_KL_TEST] if any(row.kl_against_magnitude for row in rows) else []
    return [*always, *costs, *right, *scores, *seeds, *tests, *against]


def _score(name: str) -> Column[Row]:
    return Column(
        name.replace("_", " "), lambda row: number(row.scores.get(name)), lambda row: row.scores.get(name)
    )


def _interval(ends: tuple[float, float] | None) -> str:
    return f"{ends[0]:.3f} to {ends[1]:.3f}" if ends else ABSENT


def _nearer(pair: Distance | None) -> str:
    words = {"better": "nearer", "worse": "farther"}
    return f"{words.get(pair.verdict, pair.verdict)}, {chance(pair.p)}" if pair else ABSENT


def _test(pair: Comparison | None) -> str:
    return f"{pair.verdict}, {chance(pair.p)}" if pair else ABSENT


_RIGHT: Final[Column[Row]] = Column(
    "right of n",
    lambda row: ABSENT if row.right is None else f"{row.right} of {row.n}",
    lambda row: row.right,
)
_WILSON: Final[Column[Row]] = Column(
    "right, 95 % (Wilson)",
    lambda row: _interval(row.interval),
    lambda row: row.interval.low if row.interval else None,
)
_SEEDS: Final[Column[Row]] = Column(
    "95 % over seeds",
    lambda row: _interval(row.band[1:] if row.band else None),
    lambda row: row.band.low if row.band else None,
)
_TESTS: Final[list[Column[Row]]] = [
    Column(
        "against FP32, p",
        lambda row: _test(row.against_fp32),
        lambda row: row.against_fp32.p if row.against_fp32 else None,
    ),
    Column(
        "against magnitude, p",
        lambda row: _test(row.against_magnitude),
        lambda row: row.against_magnitude.p if row.against_magnitude else None,
    ),
]
_KL_TEST: Final[Column[Row]] = Column(
    "KL against magnitude, p",
    lambda row: _nearer(row.kl_against_magnitude),
    lambda row: row.kl_against_magnitude.p if row.kl_against_magnitude else None,
)
_OVERLAP: Final[list[Column[OverlapRow]]] = [
    Column("other score", lambda row: row.other, lambda row: row.other),
    Column("svd's rank", lambda row: str(row.rank), lambda row: row.rank),
    Column("k", lambda row: f"{row.k:g}", lambda row: row.k),
    Column("mean share", lambda row: f"{row.share:.1%}", lambda row: row.share),
    Column("mean IoU", lambda row: number(row.iou, 3), lambda row: row.iou),
    Column("chance", lambda row: f"{100 * row.chance:.2g}%", lambda row: row.chance),
    Column("share over layers", lambda row: f"{row.low:.1%} to {row.high:.1%}", lambda row: row.low),
    Column("paper: 60-70 %", lambda row: row.claim or ABSENT, lambda row: row.claim),
    Column("layers", lambda row: str(row.layers), lambda row: row.layers),
]


def _run_columns(group: Group) -> list[Column[Cell]]:
    scores = [_run_score(name) for name in group.metrics]
    return [
        Column("method", lambda cell: cell.method, lambda cell: cell.method),
        Column("k", lambda cell: f"{cell.k:g}", lambda cell: cell.k),
        Column("rank", lambda cell: _whole(cell.rank), lambda cell: cell.rank),
        Column("model", lambda cell: cell.model, lambda cell: cell.model),
        Column("model seed", lambda cell: _whole(cell.model_seed), lambda cell: cell.model_seed),
        Column("draw", lambda cell: _whole(cell.score_seed), lambda cell: cell.score_seed),
        Column("right", lambda cell: _whole(cell.right), lambda cell: cell.right),
        Column("n", lambda cell: str(cell.n), lambda cell: cell.n),
        *scores,
        Column("loss", lambda cell: number(cell.loss), lambda cell: cell.loss),
        Column("KL from FP32", lambda cell: small(cell.kl), lambda cell: cell.kl),
        Column("seconds", _seconds, lambda cell: sum(cell.seconds.values()) if cell.seconds else None),
    ]


def _run_score(name: str) -> Column[Cell]:
    title = name.replace("_", " ")
    return Column(title, lambda cell: number(cell.metrics.get(name)), lambda cell: cell.metrics.get(name))


def _run_record(cell: Cell) -> dict[str, object]:
    nested = ("metrics", "seconds", "relative_error", "correct", "kl_each", "majority")
    flat: dict[str, object] = {name: value for name, value in vars(cell).items() if name not in nested}
    return flat | dict(cell.metrics) | {f"seconds_{name}": value for name, value in cell.seconds.items()}


def _whole(value: int | None) -> str:
    return ABSENT if value is None else str(value)


def _seconds(cell: Cell) -> str:
    return " + ".join(f"{value:.1f}" for value in cell.seconds.values()) or ABSENT
