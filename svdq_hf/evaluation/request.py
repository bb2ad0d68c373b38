"""Request and result of one evaluation, the same for the command line and for Python.

The fields have the names of the command line's options. Not here: the run (`evaluation.run`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from svdq_hf.core.packing import RANGES
from svdq_hf.evaluation.sweep.defaults import GRID_NAMES, KS, METHODS, PERPLEXITY, RANKS, SEEDS
from svdq_hf.evaluation.sweep.plan import SweepPlan, contestant, with_bits
from svdq_hf.evaluation.tasks.glue_tasks import TASKS


@dataclass(frozen=True)
class EvaluationRequest:
    """An evaluation of dense models, quantized in each of several ways, and of quantized ones as they are.

    Args:
        task: cola, mnli, mrpc, qnli, qqp, rte, sst2, stsb, or perplexity.
        model: folders of the models, e.g. one per seed; cells are stored under a folder's name.
        out: folder of the cells and the report; a run that was stopped goes on there.
        data: folder with TASK/train.jsonl and TASK/dev.jsonl (or tsv, csv, parquet); None: the Hub.
        text: for perplexity: a text file.
        context: for perplexity: tokens the model sees at once; None: 1024, or fewer where it takes fewer.
        tokens: for perplexity: how many tokens of the text are scored.
        k: salient weights of a layer, or shares below 1.
        saliency: scores to compare; none where only presets are.
        grid: grids of scales, by their names in `GRID_NAMES`.
        bits: bits of codes, on each grid: 3, 4 or 8.
        rank: ranks of the svd score.
        seeds: number of seeds of the random choice.
        preset: whole configs to compare: names of presets, or "default"; each quantizes the model as a
            user's would, head and embedding too where it says so.
        choices: of SVDQConfig, beside those of each preset.
        metric_script: a local copy of the evaluate library's metric "glue"; None: the package's own code.

    Raises:
        TypeError: a field that holds several values is no list or tuple, or a path is none.
        ValueError: an unknown grid or number of bits, or a count below 1; see also `SweepPlan`.

    >>> EvaluationRequest("rte", model=["rte-seed0"], out="report", k=[64], grid=["group"]).plan.grids
    ['group 64, mse']
    """

    task: str
    model: Sequence[str | Path]
    out: str | Path
    data: str | Path | None = None
    text: str | Path | None = None
    context: int | None = None
    tokens: int = 16384
    k: Sequence[int | float] = KS
    saliency: Sequence[str] = METHODS
    grid: Sequence[str] = ("default",)
    bits: Sequence[int] = (4,)
    rank: Sequence[int] = RANKS
    seeds: int = SEEDS
    preset: Sequence[str] = ()
    choices: Mapping[str, Any] = field(default_factory=dict)
    metric_script: str | Path | None = None

    def __post_init__(self) -> None:
        _check_each("task", [self.task], [*TASKS, PERPLEXITY])
        for name in ("model", "k", "saliency", "grid", "bits", "rank", "preset"):
            _check_several(name, getattr(self, name), optional=name in ("saliency", "preset"))
        if not (self.saliency or self.preset):
            raise ValueError("saliency and preset are both empty: name at least one of them")
        for name in ("out", "data", "text", "metric_script"):
            _check_path(name, getattr(self, name), optional=name != "out")
        for name in ("tokens", "seeds"):
            _check_count(name, getattr(self, name))
        _check_each("grid", self.grid, list(GRID_NAMES))
        _check_each("bits", self.bits, list(RANGES))
        self.plan  # noqa: B018  (it checks the rest)

    @property
    def plan(self) -> SweepPlan:
        """The cells to compute."""
        return SweepPlan(
            ks=self.k,
            methods=self.saliency,
            grids=[with_bits(GRID_NAMES[grid], bits) for bits in self.bits for grid in self.grid],
            seeds=self.seeds,
            ranks=self.rank,
            contestants=dict(contestant(preset, self.choices) for preset in self.preset),
        )


@dataclass(frozen=True)
class EvaluationResult:
    """What a run computed.

    Attributes:
        cells: number of cells computed in this run; those of earlier runs do not count.
        seconds: its duration.
        report: files of the report.
    """

    cells: int
    seconds: float
    report: Sequence[Path]

    def to_dict(self) -> dict[str, object]:
        """The fields, in types that JSON has."""
        files = [str(file) for file in self.report]
        return {"cells": self.cells, "seconds": self.seconds, "report": files}


def _check_several(name: str, value: Any, *, optional: bool) -> None:
    if not isinstance(value, list | tuple):
        raise TypeError(f"{name}={value!r}: must be a list; for one of them write [{value!r}]")
    if not value and not optional:
        raise ValueError(f"{name}={value!r}: must have at least one")


def _check_each(name: str, values: Sequence[Any], allowed: list[Any]) -> None:
    for value in values:
        if value not in allowed:
            raise ValueError(f"{name}={value!r}: must be one of {allowed}")


def _check_path(name: str, value: Any, *, optional: bool) -> None:
    if not (isinstance(value, str | Path) or (optional and value is None)):
        raise TypeError(f"{name}={value!r}: must be a path")


def _check_count(name: str, value: Any) -> None:
    if type(value) is not int or value < 1:
        raise ValueError(f"{name}={value!r}: must be a whole number from 1 on")
