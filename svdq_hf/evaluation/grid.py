"""The grid: one model under every method, k and grid of scales, each cell evaluated once and kept.

A cell is one JSON line of OUT/cells.jsonl, written when it is finished; a run that was killed goes on
where it stopped. Each layer is scored once per method (one SVD, one pass over calibration data),
whatever the number of k's. The models that are evaluated are real quantized ones. Not here: what a task
is (`glue`, `perplexity`), what is made of the cells (`report`).
"""

import json
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from svdq_hf.calibration import InputStatistics, collect_inputs
from svdq_hf.config import SVDQConfig
from svdq_hf.convert import empty_layer, layers_to_convert, progress, score_inputs
from svdq_hf.decompose import decompose, relative_error
from svdq_hf.footprint import footprint
from svdq_hf.linear import SVDQLinear
from svdq_hf.saliency import check_name, data_needs, score, score_needs
from svdq_hf.sparse import salient_count, top_positions

CELLS, OVERLAPS = "cells.jsonl", "overlap.jsonl"
GRIDS: dict[str, dict[str, Any]] = {
    "group 64, mse": {"group_size": 64, "scale": "mse"},
    "tensor, absmax": {"group_size": "tensor", "scale": "absmax"},
}
"""Names of the grids of scales that the paper's experiment is run on: ours, and the paper's."""

BASELINES = ("fp32", "none")


class Evaluator(Protocol):
    """Evaluates a model; the first one it is given is the FP32 reference of the rest."""

    task: str

    def __call__(self, model: Any) -> dict[str, Any]:
        """n, right, correct, metrics, loss and kl of a cell."""

    def calibration(self) -> Iterable[Any]:
        """Batches for the scores that need data."""


@dataclass(frozen=True)
class Plan:
    """What to run: every method at every k on every grid; `random` once per seed."""

    ks: Sequence[int | float] = (1, 16, 64, 256, 1024, 4096)
    methods: Sequence[str] = ("svd", "magnitude", "awq", "spqr", "random", "relative")
    grids: Sequence[str] = tuple(GRIDS)
    seeds: int = 3
    rank: int = 8

    def __post_init__(self) -> None:
        for method in self.methods:
            check_name(method)
        for grid in self.grids:
            if grid not in GRIDS:
                raise ValueError(f"grid {grid!r}: must be one of {list(GRIDS)}")
        for k in self.ks:
            SVDQConfig(k=k, rank=self.rank)  # checks both

    def cells(self) -> Iterator[tuple[str, str | None, int | float, int]]:
        """(method, grid, k, seed) of every cell: the baselines first, then method by method."""
        yield "fp32", None, 0, 0
        yield from (("none", grid, 0, 0) for grid in self.grids)
        for method in self.methods:
            for seed in range(self.seeds if "seed" in score_needs(method) and method != "svd" else 1):
                for grid in self.grids:
                    yield from ((method, grid, k, seed) for k in self.ks)

    def config(self, method: str, grid: str | None, k: int | float, seed: int) -> SVDQConfig:
        """The config of a cell."""
        saliency = "magnitude" if method in BASELINES else method
        return SVDQConfig(k=k, rank=self.rank, saliency=saliency, seed=seed, **GRIDS[grid or "group 64, mse"])


Positions = dict[int | float, dict[str, Tensor]]
"""By k and layer: flat positions of the entries that a method chose."""


@dataclass
class GridRun:
    """A dense model whose linear layers are replaced, cell after cell, by quantized ones."""

    model: Any
    name: str
    evaluate: Evaluator
    plan: Plan
    out: Path
    layers: dict[str, nn.Module] = field(init=False)
    inputs: dict[str, InputStatistics] = field(default_factory=dict)
    svd_choice: Positions = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.layers = layers_to_convert(self.model, SVDQConfig())
        self.out.mkdir(parents=True, exist_ok=True)

    def run(self) -> int:
        """Run the cells that are not finished; how many that were."""
        done = finished(self.out, self.evaluate.task, self.name)
        todo = [cell for cell in self.plan.cells() if self._key(*cell) not in done]
        if not todo:
            return 0
        started = time.perf_counter()
        reference = self.evaluate(self.model)
        seconds = {"quantize": 0.0, "evaluate": time.perf_counter() - started}
        scored: tuple[object, dict[str, Tensor]] = (None, {})
        for cell in progress(todo, "Evaluating"):
            if cell[0] == "fp32":
                self._write(cell, reference, None, seconds)
                continue
            key = self._scores_key(*cell)
            if scored[0] != key:
                scored = (key, {})  # let go of the old scores before there are new ones
                scored = (key, self._scores(*cell))
                self._compare(cell[0], cell[3], scored[1])
            self._run_cell(cell, scored[1])
        return len(todo)

    def _key(self, method: str, grid: str | None, k: int | float, seed: int) -> tuple[Any, ...]:
        return method, grid, k, seed, self.plan.rank

    def _scores_key(self, method: str, grid: str | None, k: int | float, seed: int) -> tuple[Any, ...]:
        """Cells of one key share their scores, whatever their k, and their grid if it plays no part."""
        depends = method not in BASELINES and "group" in score_needs(method)
        return method, seed, grid if depends else None

    def _scores(self, method: str, grid: str | None, k: int | float, seed: int) -> dict[str, Tensor]:
        if method in BASELINES:
            return {}
        config = self.plan.config(method, grid, k, seed)
        if data_needs(method) and not self.inputs:  # one pass for all the scores that need one
            gram = any("input_gram" in data_needs(other) for other in self.plan.methods)
            self.inputs = collect_inputs(self.model, self.layers, self.evaluate.calibration(), gram=gram)
        return {
            name: score(method, weight, score_inputs(config, weight.shape[1], self.inputs.get(name))).scores
            for name, weight in self._weights()
        }

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, module in self.layers.items():
            weight: Tensor = module.weight.detach()  # type: ignore[operator]
            yield name, (weight if type(module) is nn.Linear else weight.T).float().contiguous()

    def _run_cell(self, cell: tuple[str, str | None, int | float, int], scores: Mapping[str, Tensor]) -> None:
        started = time.perf_counter()
        config = self.plan.config(*cell)
        errors: dict[str, float] = {}
        try:
            for name, weight in self._weights():
                layer = self._quantized(name, weight, scores.get(name), config)
                errors[name] = layer.facts["relative_error"]
                self.model.set_submodule(name, layer)
            quantized = time.perf_counter()
            result = self.evaluate(self.model)
            bits = footprint(self.model).bits_per_weight
        finally:
            for name, module in self.layers.items():
                self.model.set_submodule(name, module)
        seconds = {"quantize": quantized - started, "evaluate": time.perf_counter() - quantized}
        self._write(cell, {**result, "bits_per_weight": bits}, errors, seconds)

    def _quantized(self, name: str, weight: Tensor, scores: Tensor | None, config: SVDQConfig) -> SVDQLinear:
        module = self.layers[name]
        layer = empty_layer(module, config)
        k = salient_count(config.k, *weight.shape)
        rows, columns = top_positions(weight if scores is None else scores, k)
        parts = decompose(weight, rows, columns, config.scheme)
        layer.load_parts(parts)
        layer.bias = module.bias  # type: ignore[assignment]
        layer.facts = {"relative_error": relative_error(weight, parts, config.scheme)}
        return layer

    def _write(
        self,
        cell: tuple[str, str | None, int | float, int],
        result: dict[str, Any],
        errors: dict[str, float] | None,
        seconds: dict[str, float],
    ) -> None:
        method, grid, k, seed = cell
        bits = {"bits_per_weight": 32.0} if method == "fp32" else {}
        line = {
            "task": self.evaluate.task, "model": self.name, "model_seed": model_seed(self.name),
            "method": method, "grid": grid, "k": k, "rank": self.plan.rank, "score_seed": seed,
            "relative_error": errors, "seconds": seconds, **bits, **result,
        }  # fmt: skip
        if method == "fp32":
            line["kl"] = None
        append(self.out / CELLS, [line])

    def _compare(self, method: str, seed: int, scores: Mapping[str, Tensor]) -> None:
        """Write how much of svd's choice a method makes as well, at every k."""
        if method == "svd":
            self.svd_choice = self._positions(scores)
        elif "svd" in self.plan.methods and method not in BASELINES and seed == 0:
            if not self.svd_choice:  # a run that goes on after svd's cells
                self.svd_choice = self._positions(self._scores("svd", self.plan.grids[0], 1, 0))
            append(self.out / OVERLAPS, self._overlaps(method, self._positions(scores)))

    def _positions(self, scores: Mapping[str, Tensor]) -> Positions:
        found: Positions = {}
        for k in self.plan.ks:
            for name, table in scores.items():
                rows, columns = top_positions(table, salient_count(k, *table.shape))
                found.setdefault(k, {})[name] = rows.long() * table.shape[1] + columns.long()
        return found

    def _overlaps(self, other: str, theirs: Positions) -> Iterator[dict[str, Any]]:
        for k, layers in theirs.items():
            for name, positions in layers.items():
                ours, numel = self.svd_choice[k][name], self.layers[name].weight.numel()  # type: ignore[operator]
                if ours.numel():
                    found = {"layer": name, "k": k, "other": other, **overlap(ours, positions, numel)}
                    yield {"task": self.evaluate.task, "model": self.name, **found}


def overlap(a: Tensor, b: Tensor, numel: int) -> dict[str, float]:
    """IoU and `|A and B| / |A|` of two choices of as many positions, and that share by chance.

    >>> overlap(torch.tensor([1, 2]), torch.tensor([2, 3]), 8)
    {'iou': 0.3333333333333333, 'share': 0.5, 'chance': 0.25}
    """
    common = int(torch.isin(a, b).sum())
    union = a.numel() + b.numel() - common
    return {"iou": common / union, "share": common / a.numel(), "chance": b.numel() / numel}


def finished(out: Path, task: str, model: str) -> set[tuple[Any, ...]]:
    """Keys of the cells that are in OUT already; lines that a kill cut off are taken away."""
    cells, _ = (whole_lines(out / name) for name in (CELLS, OVERLAPS))
    return {
        (cell["method"], cell["grid"], cell["k"], cell["score_seed"], cell["rank"])
        for cell in cells
        if (cell["task"], cell["model"]) == (task, model)
    }


def whole_lines(file: Path) -> list[dict[str, Any]]:
    """The JSON lines of a file; what follows the last line break was cut off, and is taken away."""
    text = file.read_text() if file.is_file() else ""
    whole, end, rest = text.rpartition("\n")
    if rest:
        file.write_text(whole + end)
    return [json.loads(line) for line in whole.splitlines() if line.strip()]


def append(file: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Append JSON lines to a file, on disk when this returns."""
    with file.open("a") as opened:
        opened.writelines(json.dumps(line) + "\n" for line in lines)
        opened.flush()
        os.fsync(opened.fileno())


def model_seed(name: str) -> int | None:
    """The fine-tuning seed that a model's name ends in.

    >>> model_seed("minilm-rte-seed2"), model_seed("minilm")
    (2, None)
    """
    found = re.search(r"seed(\d+)$", name)
    return int(found[1]) if found else None
