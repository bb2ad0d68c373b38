"""Sensitivity of a loss to rounding: the PQI of each weight of a model, and what its layers cost together.

All linear layers that a config quantizes are moved together from their dense to their rounded weights. Not
here: the integral (`calibration.pqi`), what other scores say of the same weights
(`quantize.score_agreement`), and what the score "pqi" does with it (`core.saliency`).
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging as hf_logging

from svdq_hf.calibration.pqi import RULES, Line, Loss, model_loss, places, walk
from svdq_hf.config import SVDQConfig
from svdq_hf.core.arguments import checked_arguments
from svdq_hf.core.grid_values import require
from svdq_hf.nn.expert_layouts import layout_of
from svdq_hf.quantize.rounding_lines import Sums, lines_of
from svdq_hf.quantize.selection import layers_to_convert
from svdq_hf.quantize.sensitivity_result import Sensitivity, layer_sensitivity

STEPS = 8
"""Points of the integral. By the midpoint rule 8 are as near as 32 of a one-sided sum, and nearer."""


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
    lines = lines_of(linear(model, config), config)
    summed = Sums(lines)
    for _ in walk(model, lines, given, places(steps, rule), summed.take(1 / steps), loss):
        pass
    taylor = dict.fromkeys(lines, 0.0)
    dense = _mean(walk(model, lines, given, [0.0], partial(_add_total, taylor, lines), loss))
    rounded = _mean(walk(model, lines, given, [1.0], _nothing, loss))
    rows = [layer_sensitivity(name, summed.terms[name], taylor[name]) for name in lines]
    return Sensitivity(sorted(rows, key=lambda row: -row.pqi), dense, rounded, steps, summed.terms)


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
    summed = Sums(lines)
    steps_done = walk(model, lines, given, places(steps), summed.take(1 / steps), loss)
    for _ in hf_logging.tqdm(steps_done, total=steps * len(given), desc="Integrating the loss"):
        pass
    return summed.terms


def _add_total(
    totals: dict[str, float], lines: Mapping[str, Line], name: str, grad: Tensor, at: float
) -> None:
    """Add a layer's sum of gradient times difference to its total."""
    totals[name] += float((grad * lines[name].difference()).sum(dtype=torch.float64))


def _nothing(name: str, gradient: Tensor, place: float) -> None:
    """Receives gradients that nobody needs."""


def linear(model: nn.Module, config: SVDQConfig) -> dict[str, nn.Module]:
    """The layers that are measured, by name: those that a config quantizes, without fused experts.

    Args:
        model: a dense model.
        config: how it is quantized.
    """
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
