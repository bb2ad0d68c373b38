"""Cells and groups: a cell is one evaluated model; a group is the cells of one task, kind of model and grid.

Only what they are. Not here: reading them (`evaluation.report.read`), and computing with them
(`evaluation.report.rows`).
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from svdq_hf.evaluation.sweep.defaults import PRESETS_GRID, STORED

# Baselines first, the method this package is named after next, chance last.
METHOD_ORDER: Final = ("fp32", "none", "svd", "magnitude", "relative", "awq", "spqr")


@dataclass(frozen=True)
class Cell:
    """One model under one method, evaluated once: a line that `svdq evaluate` wrote.

    Attributes:
        task: name of the task.
        model: name of the model's folder.
        method: a score, or "fp32" (dense) or "none" (nothing salient).
        k: salient weights of a layer, or a share below 1.
        n: number of examples, or of tokens.
        metrics: value by the metric's name.
        grid: name of the grid of scales; None of "fp32".
        model_seed: fine-tuning seed in the model's name.
        score_seed: seed of the random choice.
        rank: of the svd score.
        right: number of right answers; None where answers are not right or wrong.
        correct: 1 or 0 for each example.
        loss: mean, in nats (mean squared error in a regression).
        kl: mean KL from FP32, in nats.
        kl_each: KL of each example or token.
        majority: number of examples that have the commonest label.
        bits_per_weight: stored bits in the quantized layers.
        relative_error: of each layer's weight, by its name.
        seconds: time to quantize and to evaluate.
    """

    task: str
    model: str
    method: str
    k: float
    n: int
    metrics: Mapping[str, float]
    grid: str | None = None
    model_seed: int | None = None
    score_seed: int | None = None
    rank: int | None = None
    right: int | None = None
    correct: str | None = None
    loss: float | None = None
    kl: float | None = None
    kl_each: Sequence[float] | None = field(default=None, repr=False)
    majority: int | None = None
    bits_per_weight: float | None = None
    relative_error: Mapping[str, float] | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def key(self) -> tuple[object, ...]:
        """What identifies a cell."""
        choice = (self.method, self.grid, self.k, self.rank, self.score_seed)
        return (self.task, self.model, self.model_seed, *choice)

    @property
    def family(self) -> str:
        """The model's name without its seed; one table pools a family."""
        return family(self.model)


@dataclass(frozen=True)
class Overlap:
    """How much of svd's choice, at one rank and in one layer, another score chose as well."""

    task: str
    model: str
    layer: str
    k: float
    rank: int
    other: str
    iou: float
    share: float
    chance: float

    @property
    def family(self) -> str:
        """The model's name without its seed."""
        return family(self.model)


@dataclass(frozen=True)
class Group:
    """The cells of one table: one task, one kind of model, one grid; FP32 cells belong to each."""

    task: str
    family: str
    grid: str | None
    cells: list[Cell]

    @property
    def metrics(self) -> list[str]:
        """Names of the task's metrics; the first is its headline."""
        return list(dict.fromkeys(name for cell in self.cells for name in cell.metrics))

    @property
    def headline(self) -> str:
        """Name of the metric that a picture shows."""
        return self.metrics[0]

    @property
    def counts_right(self) -> bool:
        """Whether answers are right or wrong in this task: not in a regression, not in perplexity."""
        return any(cell.right is not None for cell in self.cells)

    @property
    def unit(self) -> str:
        """What `n` counts: tokens in perplexity, examples elsewhere."""
        return "tokens" if "perplexity" in self.metrics else "examples"

    @property
    def of_presets(self) -> bool:
        """Whether the cells are of whole configs, each with a k of its own, or of a quantized folder."""
        return is_whole(self.grid)

    @property
    def ks(self) -> list[float]:
        """The numbers of salient weights that the cells have, without the baselines."""
        return sorted({cell.k for cell in self.cells if cell.method not in ("fp32", "none")})

    @property
    def methods(self) -> list[str]:
        """The methods of the cells, in the order of every table and picture."""
        return in_order(cell.method for cell in self.cells)

    def of(self, method: str, k: float | None = None) -> list[Cell]:
        """The cells of a method (and of one k): one per model seed, or several where the score is random."""
        return [cell for cell in self.cells if cell.method == method and k in (None, cell.k)]


def is_whole(grid: str | None) -> bool:
    """Whether what stands for a cell's grid says that a whole config was evaluated, or a quantized folder."""
    return grid == PRESETS_GRID or (grid or "").startswith(STORED)


def family(model: str) -> str:
    """A model's name without its seed.

    >>> family("minilm-rte-seed0")
    'minilm-rte'
    """
    return re.sub(r"[-_./]?seed[-_]?\d+/?$", "", model) or model


def in_order(methods: Iterable[str]) -> list[str]:
    """Methods without repeats: known ones in their fixed order, then others by name, then random.

    >>> in_order(["random", "mine", "svd", "fp32", "svd"])
    ['fp32', 'svd', 'mine', 'random']
    """
    place = {method: number for number, method in enumerate(METHOD_ORDER)} | {"random": 2 * len(METHOD_ORDER)}
    return sorted(set(methods), key=lambda method: (place.get(method, len(METHOD_ORDER)), method))


def groups(cells: Iterable[Cell]) -> list[Group]:
    """One group per task, kind of model and grid; the FP32 cells, which have no grid, are in each.

    Args:
        cells: of any number of tasks.

    Raises:
        ValueError: cells of one group answered different numbers of examples.
    """
    found: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        found.setdefault((cell.task, cell.family), []).append(cell)
    return [_checked(group) for (task, kind), part in found.items() for group in _by_grid(task, kind, part)]


def _by_grid(task: str, kind: str, cells: list[Cell]) -> list[Group]:
    grids: list[str | None] = list(dict.fromkeys(cell.grid for cell in cells if cell.grid is not None)) or [
        None
    ]
    return [Group(task, kind, grid, [cell for cell in cells if cell.grid in (grid, None)]) for grid in grids]


def _checked(group: Group) -> Group:
    sizes = sorted({cell.n for cell in group.cells})
    if len(sizes) > 1:
        raise ValueError(
            f"task {group.task}, model {group.family}: cells over {sizes} {group.unit} cannot share a table; "
            "evaluate each size into its own folder"
        )
    return group
