"""Budget of bits for a whole model: how many salient weights each layer gets.

Each layer is quantized at a few numbers of salient weights. The budget goes, piece by piece, to the layer
where a salient weight lowers the sum of the squared relative errors most. The errors of layers are taken to
add up, so moving a bit from one layer to another is judged by that sum alone. Rounding is measured without
error feedback. With the score "pqi" the budget follows the loss: the largest PQI of all layers are salient.
Not here: the errors of one layer (`quantize.weight`), and which layers there are (`quantize.selection`).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers.utils import logging as hf_logging

from svdq_hf.calibration.inputs import InputStatistics
from svdq_hf.config import SVDQConfig
from svdq_hf.format.parts import part_specs
from svdq_hf.quantize.weight import errors_at

SALIENT_BITS = 96
"""Stored bits of one salient weight: its value, its row and its column."""

STEPS = (0.0, 0.5, 1.0, 2.0, 4.0)
"""Where a layer's error is measured, in multiples of its even share of the budget."""


class BudgetItem(NamedTuple):
    """A layer that bits are spent on.

    Attributes:
        out: rows of its weight.
        in_features: columns of its weight.
        weight: returns the weight `[out, in]`; called when it is needed, and the result is freed at once.
    """

    out: int
    in_features: int
    weight: Callable[[], Tensor]

    @property
    def numel(self) -> int:
        """Number of its weights."""
        return self.out * self.in_features


@dataclass
class Measured:
    """Relative errors of one layer at some numbers of salient weights."""

    error: dict[int, float]

    def gains(self) -> list[tuple[float, int, int]]:
        """Segments of the lower convex hull of the squared error against k, steepest first.

        Returns:
            Tuples (squared error saved per salient weight, k at the start, k at the end).
        """
        ks, pieces = sorted(self.error), []
        at = 0
        while at < len(ks) - 1:
            slopes = [
                ((self.error[ks[at]] ** 2 - self.error[k] ** 2) / (k - ks[at]), next_at)
                for next_at, k in enumerate(ks[at + 1 :], at + 1)
            ]
            gain, after = max(slopes)
            if gain <= 0:
                break
            pieces.append((gain, ks[at], ks[after]))
            at = after
        return pieces


def spend(
    layers: Mapping[str, BudgetItem], config: SVDQConfig, seen: Mapping[str, InputStatistics]
) -> SVDQConfig:
    """Turn `target_bits` of a config into a number of salient weights for each layer.

    The sums of the layers' relative errors and of their squares are no larger than with one k for all.

    Args:
        layers: what the budget is spent on, by name.
        config: the config.
        seen: statistics of inputs by the layer's name, for scores that need data.

    Returns:
        The config with `layer_k`; unchanged where it has no `target_bits`, or `layer_k` already.

    Raises:
        ValueError: fewer bits than the layers take with nothing salient, or more than with everything.
    """
    if config.target_bits is None or config.layer_k is not None:
        return config
    total = _affordable(layers, config, config.target_bits)
    if "sensitivity" in config.data_needs:
        return config.replace(layer_k=by_sensitivity(seen, total))
    even, shared = _same_count(layers, total), _same_share(layers, total)
    measured: dict[str, Measured] = {}

    def measure(name: str, ks: set[int]) -> None:
        weight = layers[name].weight()
        known = measured.setdefault(name, Measured({}))
        known.error |= errors_at(weight, config, name, sorted(ks - known.error.keys()), seen.get(name))

    for name, layer in hf_logging.tqdm(layers.items(), desc="Measuring errors"):
        top = min(layer.numel, total)
        steps = {min(top, round(step * shared[name])) for step in STEPS}
        measure(name, steps | {even[name], shared[name]})
    chosen = by_gain({name: found.gains() for name, found in measured.items()}, total)
    for name, k in chosen.items():
        if k not in measured[name].error:  # the piece that the last bits do not pay in full
            measure(name, {k})

    def sums(ks: Mapping[str, int]) -> tuple[float, float]:
        errors = [measured[name].error[k] for name, k in ks.items()]
        return sum(error**2 for error in errors), sum(errors)

    def is_no_worse(ks: Mapping[str, int]) -> bool:
        return all(mine <= theirs for mine, theirs in zip(sums(ks), sums(even), strict=True))

    return config.replace(layer_k=min(filter(is_no_worse, (chosen, shared, even)), key=sums))


def by_gain(gains: Mapping[str, list[tuple[float, int, int]]], total: int) -> dict[str, int]:
    """Distribute salient weights over layers: the segments that save most come first, the last one in part.

    Args:
        gains: segments of each layer, as `Measured.gains` returns them.
        total: salient weights to distribute.

    Returns:
        k by the layer's name, `total` in sum where the segments suffice.

    >>> by_gain({"a": [(3.0, 0, 4), (1.0, 4, 9)], "b": [(2.0, 0, 5)]}, 10)
    {'a': 5, 'b': 5}
    """
    ks, left = dict.fromkeys(gains, 0), total
    pieces = [(-gain, name, start, end) for name, found in gains.items() for gain, start, end in found]
    for _, name, start, end in sorted(pieces, key=lambda piece: piece[0]):
        ks[name] = start + min(end - start, left)
        left -= ks[name] - start
        if not left:
            break
    return ks


def by_sensitivity(seen: Mapping[str, InputStatistics], total: int) -> dict[str, int]:
    """Distribute salient weights by PQI: the largest of the whole model, as far as they are above 0.

    Args:
        seen: statistics with `sensitivity`, by the layer's name.
        total: salient weights to distribute.

    Returns:
        k by the layer's name.
    """
    terms = {name: found.sensitivity for name, found in seen.items() if found.sensitivity is not None}
    best = torch.empty(0)
    for values in terms.values():
        part = values.flatten().topk(min(total, values.numel())).values.cpu()
        best = torch.cat([best, part]).topk(min(total, best.numel() + part.numel())).values
    least = max(0.0, float(best[-1])) if total else math.inf
    counts = {name: int((values > least).sum()) for name, values in terms.items()}
    left = int((best == least).sum()) if least else 0
    for name, values in terms.items():  # equal ones: those of the first layers
        more = min(left, int((values == least).sum()))
        counts[name], left = counts[name] + more, left - more
    return counts


def _affordable(layers: Mapping[str, BudgetItem], config: SVDQConfig, target_bits: float) -> int:
    """Number of salient weights that `target_bits` pay for in all layers together."""
    nothing = config.replace(k=0).scheme
    specs = [part_specs(layer.out, layer.in_features, nothing).values() for layer in layers.values()]
    fixed = 8 * sum(math.prod(spec.shape) * spec.dtype.itemsize for layer in specs for spec in layer)
    weights = sum(layer.numel for layer in layers.values())
    count = math.floor((target_bits * weights - fixed) / SALIENT_BITS + 1e-9)
    if not 0 <= count <= weights:
        least, most = fixed / weights, fixed / weights + SALIENT_BITS
        raise ValueError(
            f"target_bits={target_bits}: the {len(layers)} layers to quantize take {least:.4f} bits per "
            f"weight with nothing salient and {most:.4f} with everything; give a number from "
            f"{math.ceil(least * 1000) / 1000:.3f} on, or choose fewer bits or larger groups"
        )
    return count


def _same_count(layers: Mapping[str, BudgetItem], total: int) -> dict[str, int]:
    """The same k in every layer; a layer with fewer weights gets as many as it has."""
    k = total // len(layers)
    return {name: min(k, layer.numel) for name, layer in layers.items()}


def _same_share(layers: Mapping[str, BudgetItem], total: int) -> dict[str, int]:
    weights = sum(layer.numel for layer in layers.values())
    return {name: total * layer.numel // weights for name, layer in layers.items()}
