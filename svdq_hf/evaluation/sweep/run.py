"""Sweep: one model under every method, k and grid of scales, each cell evaluated once and stored.

A cell is one JSON line of OUT/cells.jsonl, written when it is computed; a run that was killed goes on
where it stopped. Each layer is scored once per method (one SVD, one pass over calibration data),
whatever the number of k's. The models that are evaluated are real quantized ones. Not here: what a cell holds
(`evaluation.sweep.cell`), what a task is (`evaluation.tasks`), and what is made of the cells
(`evaluation.report`).
"""

import copy
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from svdq_hf.calibration.inputs import InputStatistics, collect_inputs
from svdq_hf.config import SVDQConfig
from svdq_hf.core.saliency import Scored, data_needs
from svdq_hf.core.topk import salient_count, top_positions
from svdq_hf.evaluation.sweep.cell import Evaluator, measured, write_cell
from svdq_hf.evaluation.sweep.defaults import PRESETS_GRID
from svdq_hf.evaluation.sweep.plan import BASELINES, Key, SweepPlan
from svdq_hf.evaluation.sweep.store import OVERLAPS, append, finished, whole_lines
from svdq_hf.integrations.transformers.in_memory import quantize_model
from svdq_hf.nn.expert_layouts import layout_of
from svdq_hf.quantize.budget import affordable, by_loss, items_of
from svdq_hf.quantize.convert import progress
from svdq_hf.quantize.footprint import footprint
from svdq_hf.quantize.input_statistics import check_loss, collect_for
from svdq_hf.quantize.layer import matrix_of, quantized_layer
from svdq_hf.quantize.selection import dense_weight, layers_to_convert
from svdq_hf.quantize.weight import score_weight

logger = logging.getLogger(__name__)


Scores = Mapping[str, Scored]
"""Scores `[out, in]` of a method, by layer."""

Positions = dict[int | float, dict[str, Tensor]]
"""Flat positions `[k]` that a method chose, by k and layer."""


@dataclass
class Sweep:
    """A dense model whose linear layers are replaced, cell after cell, by quantized ones.

    Attributes:
        model: the dense model; each cell leaves it as it was.
        name: of the model, in the cells.
        evaluate: evaluates a model on the task.
        plan: the cells.
        out: folder of the cells.
        layers: the dense layers that are quantized, by name.
        inputs: statistics of their inputs, collected when a score needs them.
        svd_choice: by rank, the positions `[k]` that svd chose.
    """

    model: Any
    name: str
    evaluate: Evaluator
    plan: SweepPlan
    out: Path
    layers: dict[str, nn.Module] = field(init=False)
    inputs: dict[str, InputStatistics] = field(default_factory=dict)
    svd_choice: dict[int | None, Positions] = field(default_factory=dict)  # by rank

    def __post_init__(self) -> None:
        self.layers = _evaluated(self.model)
        self.out.mkdir(parents=True, exist_ok=True)

    def run(self) -> int:
        """Compute the cells that are missing; returns how many those were."""
        done = finished(self.out, self.evaluate.task, self.name)
        todo = [key for key in self.plan.cells() if key not in done]
        if todo:
            self._run(todo)
        self._complete_overlaps()
        return len(todo)

    def _run(self, todo: Sequence[Key]) -> None:
        for config in self.plan.contestants.values():
            check_loss(self.model, config)
        started = time.perf_counter()
        reference = self.evaluate(self.model)
        seconds = {"quantize": 0.0, "evaluate": time.perf_counter() - started}
        scored: tuple[object, Scores] = (None, {})
        for key in progress(todo, "Evaluating"):
            if key.method == "fp32":
                self._write(key, reference, None, seconds)
                continue
            if key.grid == PRESETS_GRID:
                self._run_contestant(key)
                continue
            if scored[0] != key.scoring:
                scored = (key.scoring, {})  # let go of the old scores before there are new ones
                scored = (key.scoring, self._scores(key))
                self._compare(key, scored[1])
            self._run_cell(key, scored[1])

    def _scores(self, key: Key) -> Scores:
        if key.method in BASELINES:
            return {}
        config, inputs = key.config, self.inputs
        if config.follows_loss:  # which depends on how weights are rounded
            inputs = collect_for(self.model, self.layers, config, self.evaluate.calibration())
        elif data_needs(key.method) and not self.inputs:  # one pass for all the scores that need one
            gram = any("input_gram" in data_needs(other) for other in self.plan.methods)
            inputs = collect_inputs(self.model, self.layers, self.evaluate.calibration(), gram=gram)
            self.inputs = inputs
        return {
            name: score_weight(matrix_of(module), config, name, inputs.get(name))
            for name, module in self.layers.items()
        }

    def _run_cell(self, key: Key, scores: Scores) -> None:
        started, config = time.perf_counter(), self._spent(key, scores)
        errors: dict[str, float] = {}
        try:
            for name, module in self.layers.items():
                layer = quantized_layer(name, module, config, scored=scores.get(name))
                errors[name] = layer.facts["relative_error"]
                self.model.set_submodule(name, layer)
            quantized = time.perf_counter()
            result = self.evaluate(self.model)
            bits = footprint(self.model).bits_per_weight
        finally:
            for name, module in self.layers.items():
                self.model.set_submodule(name, module)
        seconds = {"quantize": quantized - started, "evaluate": time.perf_counter() - quantized}
        self._write(key, {**result, "bits_per_weight": bits}, errors, seconds)

    def _spent(self, key: Key, scores: Scores) -> SVDQConfig:
        """The cell's config; of ReQuant with the k of each layer, as many in all as k gives the others."""
        config = key.config
        if "given_back" not in config.data_needs:
            return config
        order = {name: scored.scores for name, scored in scores.items()}
        return config.replace(layer_k=by_loss(order, affordable(items_of(self.layers), config)))

    def _run_contestant(self, key: Key) -> None:
        """Evaluate a copy of the model that is quantized as a whole, heads and embeddings too."""
        started = time.perf_counter()
        config = self.plan.contestants[key.method]
        batches = self.evaluate.calibration() if config.needs_batches else None
        model = quantize_model(copy.deepcopy(self.model), config, batches)
        quantized = time.perf_counter()
        self._write(
            key,
            *measured(model, self.evaluate),
            {"quantize": quantized - started, "evaluate": time.perf_counter() - quantized},
        )

    def _write(
        self,
        key: Key,
        result: dict[str, Any],
        errors: dict[str, float] | None,
        seconds: dict[str, float],
    ) -> None:
        dense = {"bits_per_weight": 32.0, "kl": None, "kl_each": None} if key.method == "fp32" else {}
        about = {"task": self.evaluate.task, "model": self.name}
        write_cell(self.out, key, {**about, "relative_error": errors, "seconds": seconds, **result, **dense})

    def _compare(self, key: Key, scores: Scores, ranks: Sequence[int] | None = None) -> None:
        """Write the overlap of a method's choice with svd's, for each rank and every k."""
        if key.grid != self.plan.grids[0]:  # scored again for another grid: the first one is compared
            return
        if key.method == "svd":
            self.svd_choice[key.rank] = self._positions(scores)
        elif "svd" in self.plan.methods and key.method not in BASELINES and key.seed == 0:
            theirs = self._positions(scores)
            for rank in self.plan.ranks if ranks is None else ranks:
                if rank not in self.svd_choice:  # a run that goes on after svd's cells
                    svd = Key("svd", self.plan.grids[0], 1, 0, rank)
                    self.svd_choice[rank] = self._positions(self._scores(svd))
                append(self.out / OVERLAPS, self._overlaps(key.method, rank, theirs))

    def _complete_overlaps(self) -> None:
        """Write the overlaps that no missing cell has triggered: of ranks or ks that were added later."""
        lines = whole_lines(self.out / OVERLAPS)
        mine = [line for line in lines if (line["task"], line["model"]) == (self.evaluate.task, self.name)]
        there = {(line.get("rank"), line["other"], line["k"]) for line in mine}
        ks = [k for k in self.plan.ks if k > 0]
        others = [method for method in self.plan.methods if method != "svd"]
        for method in others if "svd" in self.plan.methods else []:
            ranks = [rank for rank in self.plan.ranks if any((rank, method, k) not in there for k in ks)]
            if ranks:
                key = Key(method, self.plan.grids[0], self.plan.ks[0], 0, None)
                self._compare(key, self._scores(key), ranks)

    def _positions(self, scores: Scores) -> Positions:
        found: Positions = {}
        for k in self.plan.ks:
            for name, (table, _) in scores.items():
                rows, columns = top_positions(table, salient_count(k, *table.shape))
                found.setdefault(k, {})[name] = rows.long() * table.shape[1] + columns.long()
        return found

    def _overlaps(self, other: str, rank: int, theirs: Positions) -> Iterator[dict[str, Any]]:
        about = {"task": self.evaluate.task, "model": self.name, "rank": rank, "other": other}
        for k, layers in theirs.items():
            for name, positions in layers.items():
                ours, numel = self.svd_choice[rank][k][name], dense_weight(self.layers[name]).numel()
                if ours.numel():
                    yield {**about, "layer": name, "k": k, **overlap(ours, positions, numel)}


def _evaluated(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that are quantized here: those of the default config, without fused experts."""
    layers = layers_to_convert(model, SVDQConfig())
    experts = [name for name, module in layers.items() if layout_of(module) is not None]
    if experts:
        logger.warning(
            "fused experts stay dense in this evaluation: %d modules, %s%s",
            len(experts),
            ", ".join(experts[:3]),
            ", ..." if len(experts) > 3 else "",
        )
    return {name: module for name, module in layers.items() if name not in experts}


def overlap(a: Tensor, b: Tensor, numel: int) -> dict[str, float]:
    """IoU and `|A and B| / |A|` of two sets of positions, and the share expected by chance.

    Args:
        a: flat positions `[k]` of one choice.
        b: flat positions `[k]` of the other.
        numel: entries of the matrix.

    Returns:
        iou, share and chance.

    >>> overlap(torch.tensor([1, 2]), torch.tensor([2, 3]), 8)
    {'iou': 0.3333333333333333, 'share': 0.5, 'chance': 0.25}
    """
    common = int(torch.isin(a, b).sum())
    union = a.numel() + b.numel() - common
    return {"iou": common / union, "share": common / a.numel(), "chance": b.numel() / numel}
