"""Sensitivity of a loss to rounding: the PQI of each weight of a model, and what its layers cost together.

All linear layers that a config quantizes are moved together from their dense to their rounded weights. Not
here: the integral (`calibration.pqi`), what other scores say of the same weights
(`quantize.score_agreement`), and what the score "pqi" does with it (`core.saliency`).
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging as hf_logging

from svdq_hf.calibration.pqi import RULES, Line, Loss, model_loss, places, walk
from svdq_hf.config import SVDQConfig
from svdq_hf.core.arguments import checked_arguments
from svdq_hf.core.grid_values import require
from svdq_hf.nn.expert_layouts import layout_of
from svdq_hf.quantize.rounding_lines import GradientSums, lines_of
from svdq_hf.quantize.selection import layers_to_convert
from svdq_hf.quantize.sensitivity_result import Sensitivity, layer_sensitivity

STEPS = 8
"""Points of the integral. Where rounding leaves a model whole, 8 are nearer than 32 of a one-sided sum."""


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
    summed, first = GradientSums(lines), GradientSums(lines)
    for _ in walk(model, lines, given, places(steps, rule), summed.take(1 / steps), loss):
        pass
    dense = _mean(walk(model, lines, given, [0.0], first.take(1.0), loss))
    rounded = _mean(walk(model, lines, given, [1.0], _nothing, loss))
    terms = summed.terms()
    taylor = {name: float(one.sum(dtype=torch.float64)) for name, one in first.terms().items()}
    rows = [layer_sensitivity(name, terms[name], taylor[name]) for name in lines]
    return Sensitivity(sorted(rows, key=lambda row: -row.pqi), dense, rounded, steps, terms)


def pqi(
    model: nn.Module,
    lines: Mapping[str, Line],
    batches: Sequence[Any],
    loss: Loss = model_loss,
    pass_of: str = "",
) -> dict[str, Tensor]:
    """The size of the PQI of each weight: the root of the sum of its squares over the sequences.

    The sum of PQI is what rounding costs, but its terms are of both signs and cancel. Whoever keeps only the
    weights that cost ends at a model that is out of balance, with a loss larger than before. What a weight
    costs for itself, with all others rounded somehow, grows with the square of its term: Fisher's information
    times the square of its error. So the score is a size.

    Args:
        model: the dense model.
        lines: of the layers, by name.
        batches: what the loss takes, of as many sequences each; each batch has a place of its own on the
            line, so that one pass over all makes the integral.
        loss: of a model and a batch.
        pass_of: which of several such passes this is, such as "1 of 3", for the bar of progress.

    Returns:
        `[out, in]`, float32, by the layer's name.

    Raises:
        ValueError: see `sensitivity`.
    """
    given = _several(batches)
    summed, steps = GradientSums(lines), zip(given, places(len(given)), strict=True)
    for batch, place in hf_logging.tqdm(
        steps, total=len(given), desc=f"Integrating the loss {pass_of}".rstrip()
    ):
        for _ in walk(model, lines, [batch], [place], summed.take_square, loss):
            pass
    return summed.sizes()


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
