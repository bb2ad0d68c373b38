"""Plan of a sweep: methods, numbers of salient weights, grids of scales, ranks and seeds.

Only which cells there are and the config of each; `evaluation.sweep.run` computes them.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, NamedTuple

from svdq_hf.config import SVDQConfig
from svdq_hf.config.choices import VERSION_1
from svdq_hf.config.presets import PRESETS
from svdq_hf.core.saliency import BY_LOSS, check_name, score_needs
from svdq_hf.evaluation.sweep.defaults import GRID_NAMES, KS, METHODS, PRESETS_GRID, RANKS, SEEDS

DEFAULT, OURS, PAPERS = GRID_NAMES.values()
GRIDS: dict[str, dict[str, Any]] = {
    DEFAULT: {},
    OURS: {"group_size": 64, "scale": "mse", **VERSION_1},
    PAPERS: {"group_size": "tensor", "scale": "absmax", **VERSION_1},
}
"""Grids of scales by name, of 4 bits: that of SVDQConfig(), that of format version 1, and the paper's."""

MORE_BITS = (3, 8)


def with_bits(grid: str, bits: int) -> str:
    """Name of a grid with codes of some number of bits.

    >>> with_bits("default", 3), with_bits("default", 4)
    ('default, 3 bits', 'default')
    """
    return grid if bits == 4 else f"{grid}, {bits} bits"


GRIDS |= {
    with_bits(grid, bits): {**choices, "bits": bits} for grid, choices in GRIDS.items() for bits in MORE_BITS
}

BASELINES = ("fp32", "none")


@dataclass(frozen=True)
class SweepPlan:
    """Cells of a sweep: every method at every k on every grid; `random` once per seed, svd once per rank.

    Attributes:
        ks: salient weights of a layer, or shares below 1.
        methods: scores, by name.
        grids: names of `GRIDS`.
        seeds: number of seeds of the random choice.
        ranks: ranks of the svd score.
        contestants: whole configs by name, each of which quantizes the model as a user's would.

    Raises:
        ValueError: an unknown score or grid, or an impossible k or rank.
    """

    ks: Sequence[int | float] = KS
    methods: Sequence[str] = METHODS
    grids: Sequence[str] = (OURS, PAPERS)
    seeds: int = SEEDS
    ranks: Sequence[int] = RANKS
    contestants: Mapping[str, SVDQConfig] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for method in self.methods:
            check_name(method)
        for grid in self.grids:
            if grid not in GRIDS:
                raise ValueError(f"grid {grid!r}: must be one of {list(GRIDS)}")
        for k in self.ks:
            SVDQConfig(k=k)  # checks it
        for rank in self.ranks:
            SVDQConfig(rank=rank)

    def cells(self) -> Iterator["Key"]:
        """The key of every cell: FP32, whole configs, nothing salient, then method by method."""
        yield Key("fp32", None, 0, 0, None)
        for name, config in self.contestants.items():
            yield Key(name, PRESETS_GRID, config.k, 0, None)
        if not self.methods:
            return
        yield from (Key("none", grid, 0, 0, None) for grid in self.grids)
        for method in self.methods:
            needs = score_needs(method)
            ranks = self.ranks if "rank" in needs else (None,)
            seeds = self.seeds if "seed" in needs and method != "svd" else 1
            for rank, seed, grid, k in product(ranks, range(seeds), self.grids, self.ks):
                yield Key(method, grid, k, seed, rank)


def contestant(preset: str, choices: Mapping[str, Any]) -> tuple[str, SVDQConfig]:
    """A whole config and its name in tables.

    Args:
        preset: of `PRESETS`, or "default".
        choices: others than the preset's.

    Raises:
        ValueError: an unknown preset, or an impossible choice.

    >>> contestant("best", {"lm_head": True, "bits": 3})[0]
    'best, lm_head, bits=3'
    """
    if preset != DEFAULT and preset not in PRESETS:
        raise ValueError(f"preset={preset!r}: must be one of {[DEFAULT, *PRESETS]}")
    changes = {} if preset == DEFAULT else PRESETS[preset].changes
    more = [name if value is True else f"{name}={value}" for name, value in choices.items()]
    return ", ".join([preset, *more]), SVDQConfig(**{**changes, **choices})


class Key(NamedTuple):
    """What identifies a cell among those of one task and model.

    Attributes:
        method: a score, "fp32" (dense), "none" (nothing salient), or the name of a whole config.
        grid: name of the grid of scales, or `PRESETS_GRID` of a whole config; None of "fp32".
        k: salient weights of a layer, or a share below 1.
        seed: of the random choice.
        rank: of the svd score; None for other scores.
    """

    method: str
    grid: str | None
    k: int | float
    seed: int
    rank: int | None

    @property
    def config(self) -> SVDQConfig:
        """The config that this cell is quantized with."""
        return SVDQConfig(
            k=self.k,
            saliency="magnitude" if self.method in BASELINES else self.method,
            rank=self.rank or 8,
            seed=self.seed,
            **GRIDS[self.grid or DEFAULT],
        )

    @property
    def scoring(self) -> tuple[object, ...]:
        """Equal for cells that share scores: all k, and all grids, where the score sees none of them."""
        needs = score_needs(self.config.saliency)
        sees_grid = self.config.column_scale or not {"group", *BY_LOSS}.isdisjoint(needs)
        depends = self.method not in BASELINES and sees_grid
        k = self.k if "given_back" in needs else None  # ReQuant's rounds depend on what they may spend
        return self.method, self.seed, self.rank, self.grid if depends else None, k
