"""Sensitivity of a loss to rounding: the PQI of each weight of a model, and what its layers cost together.

All linear layers that a config quantizes are moved together from their dense to their rounded weights. Not
here: the integral (`calibration.pqi`), and what the score "pqi" does with it (`core.saliency`).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging as hf_logging

from svdq_hf.calibration.pqi import RULES, Line, Loss, model_loss, places, walk
from svdq_hf.config import SVDQConfig
from svdq_hf.core.arguments import checked_arguments
from svdq_hf.core.grid_values import require
from svdq_hf.format.decode import reconstruct
from svdq_hf.nn.expert_layouts import layout_of
from svdq_hf.quantize.layer import matrix_of
from svdq_hf.quantize.selection import layers_to_convert
from svdq_hf.quantize.weight import quantize_weight

STEPS = 8
"""Points of the integral. By the midpoint rule 8 are as near as 32 of a one-sided sum, and nearer."""


@dataclass(frozen=True)
class LayerSensitivity:
    """What rounding one layer costs.

    Attributes:
        name: of the layer.
        shape: of its weight, `(out, in)`.
        pqi: sum over its weights: its part of the change of the loss, in nats.
        first_order: the same by the gradient at the dense weights alone (Taylor).
        top_share: of the sum of all positive terms, the part that the 0.5 % largest hold.
    """

    name: str
    shape: tuple[int, int]
    pqi: float
    first_order: float
    top_share: float


@dataclass(frozen=True)
class Sensitivity:
    """What rounding a model's layers costs, as predicted by PQI and as measured.

    Attributes:
        layers: the largest cost first.
        dense_loss: mean loss of the dense model on the batches.
        rounded_loss: with every layer rounded.
        steps: points of the integral.
    """

    layers: list[LayerSensitivity]
    dense_loss: float
    rounded_loss: float
    steps: int

    @property
    def change(self) -> float:
        """The true change of the loss."""
        return self.rounded_loss - self.dense_loss

    @property
    def predicted(self) -> float:
        """The sum of PQI over all weights."""
        return sum(layer.pqi for layer in self.layers)

    @property
    def first_order(self) -> float:
        """The change by the gradient at the dense weights alone."""
        return sum(layer.first_order for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """All figures, in types that JSON has."""
        sums = {"change": self.change, "predicted": self.predicted, "first_order": self.first_order}
        return {**sums, **asdict(self)}


TOP = 0.005
"""The share of weights that the paper gives back."""


@checked_arguments(
    model="load it first, e.g. AutoModelForCausalLM.from_pretrained(name)",
    batches="must be a list of batches, each what the model takes; put a single one into a list: [batch]",
    config="must be an SVDQConfig, such as SVDQConfig(k=0)",
)
def sensitivity(
    model: nn.Module,
    batches: Iterable[Any],
    config: SVDQConfig | None = None,
    *,
    steps: int = STEPS,
    rule: str = "midpoint",
    loss: Loss = model_loss,
) -> Sensitivity:
    """What rounding each linear layer of a model costs a loss, by PQI. The model is left as it was.

    Args:
        model: a dense model.
        batches: what the loss takes; the figures hold for texts like these.
        config: how weights are rounded; salient ones are rounded too. None: `SVDQConfig()`.
        steps: points of the integral, each a forward and a backward pass over all batches.
        rule: "midpoint", or a one-sided sum, "left" or "right".
        loss: of a model and a batch; by default the model's own, of the next tokens where it has no labels.

    Returns:
        A row for each layer, and the loss before and after.

    Raises:
        TypeError: an argument is of a wrong type (`WrongKind`, which is a ValueError as well).
        ValueError: no batch, a number of steps below 1, an unknown rule, or a loss that has no gradient.

    Source: arXiv 2503.01901.
    """
    require(steps >= 1, "steps", steps, "at least 1")
    require(rule in RULES, "rule", rule, f"one of {list(RULES)}")
    given, config = _several(batches), config or SVDQConfig()
    lines = lines_of(_linear(model, config), config)
    summed = _Sums(lines)
    for _ in walk(model, lines, given, places(steps, rule), summed.take(1 / steps), loss):
        pass
    taylor = dict.fromkeys(lines, 0.0)
    dense = _mean(walk(model, lines, given, [0.0], partial(_add_total, taylor, lines), loss))
    rounded = _mean(walk(model, lines, given, [1.0], _nothing, loss))
    rows = [_row(name, summed.terms[name], taylor[name]) for name in lines]
    return Sensitivity(sorted(rows, key=lambda row: -row.pqi), dense, rounded, steps)


def pqi(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    config: SVDQConfig,
    batches: Sequence[Any],
    steps: int = STEPS,
    loss: Loss = model_loss,
) -> dict[str, Tensor]:
    """The PQI of each weight of some layers: about what the loss wins if that weight is not rounded.

    Args:
        model: the dense model.
        layers: linear layers of it, by name.
        config: how they are rounded.
        batches: what the loss takes.
        steps: points of the integral.
        loss: of a model and a batch.

    Returns:
        `[out, in]`, float32, by the layer's name.

    Raises:
        ValueError: see `sensitivity`.
    """
    given = _several(batches)
    lines = lines_of(layers, config)
    summed = _Sums(lines)
    steps_done = walk(model, lines, given, places(steps), summed.take(1 / steps), loss)
    for _ in hf_logging.tqdm(steps_done, total=steps * len(given), desc="Integrating the loss"):
        pass
    return summed.terms


def lines_of(layers: Mapping[str, nn.Module], config: SVDQConfig) -> dict[str, Line]:
    """The lines from dense to rounded weights; the rounded ones are kept packed.

    Args:
        layers: linear layers, by name.
        config: how they are rounded; nothing is salient, and errors are not fed back.
    """
    plain = config.replace(k=0, saliency="magnitude", error_feedback=False, target_bits=None, layer_k=None)
    found = {}
    for name, module in layers.items():
        dense = partial(matrix_of, module)
        parts, _ = quantize_weight(dense(), plain, name)
        found[name] = Line(module, dense, partial(reconstruct, parts, dense().shape[1], plain.scheme))
    return found


class _Sums:
    """Sums of gradient times difference, a matrix for each layer."""

    def __init__(self, lines: Mapping[str, Line]) -> None:
        self.lines = lines
        self.terms = {
            name: torch.zeros_like(line.dense(), dtype=torch.float32) for name, line in lines.items()
        }

    def take(self, weight: float) -> Any:
        """What receives gradients, each of which counts with a weight."""

        def add(name: str, gradient: Tensor, place: float) -> None:
            self.terms[name].addcmul_(gradient, self.lines[name].difference(), value=weight)

        return add


def _add_total(
    totals: dict[str, float], lines: Mapping[str, Line], name: str, grad: Tensor, at: float
) -> None:
    """Add a layer's sum of gradient times difference to its total."""
    totals[name] += float((grad * lines[name].difference()).sum(dtype=torch.float64))


def _nothing(name: str, gradient: Tensor, place: float) -> None:
    """Receives gradients that nobody needs."""


def _linear(model: nn.Module, config: SVDQConfig) -> dict[str, nn.Module]:
    chosen = layers_to_convert(model, config)
    return {name: module for name, module in chosen.items() if layout_of(module) is None}


def _several(batches: Iterable[Any]) -> list[Any]:
    given = list(batches)
    if not given:
        raise ValueError("no batch: a loss needs at least one")
    return given


def _mean(seen: Iterable[tuple[float, float]]) -> float:
    losses = [loss for _, loss in seen]
    return sum(losses) / len(losses)


def _row(name: str, terms: Tensor, taylor: float) -> LayerSensitivity:
    positive = terms.clamp(min=0).flatten()
    total = float(positive.sum(dtype=torch.float64))
    top = float(positive.topk(max(1, round(TOP * positive.numel()))).values.sum(dtype=torch.float64))
    cost = float(terms.sum(dtype=torch.float64))
    out, in_features = terms.shape
    return LayerSensitivity(name, (out, in_features), cost, taylor, top / total if total else 0.0)
