"""Budget of bits for a whole model: how many salient weights each layer gets.

Each layer is quantized at a few numbers of salient weights. The budget goes, piece by piece, to the layer
where a salient weight lowers the sum of the squared relative errors most. The errors of layers are taken to
add up, so moving a bit from one layer to another is judged by that sum alone. Rounding is measured without
error feedback. With a score that knows the loss ("pqi", "requant") the budget follows it: the highest scores
of all layers are salient. Not here: the errors of one layer (`quantize.weight`), and which layers there are
(`quantize.selection`).
"""

import math
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.utils import logging as hf_logging

from svdq_hf.calibration.inputs import InputStatistics
from svdq_hf.config import SVDQConfig
from svdq_hf.core.topk import salient_count
from svdq_hf.format.parts import part_specs
from svdq_hf.quantize.layer import matrix_of
from svdq_hf.quantize.selection import shape_of
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


def items_of(modules: Mapping[str, nn.Module]) -> dict[str, BudgetItem]:
    """Dense layers as what bits are spent on.

    Args:
        modules: linear layers, by name.
    """
    return {name: BudgetItem(*shape_of(one), partial(matrix_of, one)) for name, one in modules.items()}


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
    """Turn a budget into a number of salient weights for each layer: `target_bits`, or ReQuant's.

    The sums of the layers' relative errors and of their squares are no larger than with one k for all, unless
    the budget follows the loss.

    Args:
        layers: what the budget is spent on, by name.
        config: the config.
        seen: statistics of inputs by the layer's name, for scores that need data.

    Returns:
        The config with `layer_k`; unchanged where it has no budget, or `layer_k` already.

    Raises:
        ValueError: fewer bits than the layers take with nothing salient, or more than with everything.
    """
    if config.layer_k is not None or not (config.target_bits or "given_back" in config.data_needs):
        return config
    if config.follows_loss:
        scores = {name: one.sensitivity for name, one in seen.items() if one.sensitivity is not None}
        budget, others = followed_budget(layers, config, scores)
        return config.replace(layer_k=by_loss(scores, budget) | others)
    total = affordable(layers, config)
    even, shared = _same_count(layers, total), _same_share(layers, total)
    measured: dict[str, Measured] = {}

    def measure(name: str, ks: set[int]) -> None:
        weight = layers[name].weight()
        known = measured.setdefault(name, Measured({}))
        own = config if name in seen else config.without_data()
        known.error |= errors_at(weight, own, name, sorted(ks - known.error.keys()), seen.get(name))

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


def by_loss(scores: Mapping[str, Tensor], total: int) -> dict[str, int]:
    """Distribute salient weights by scores that know the loss: the highest of the whole model above 0.

    Args:
        scores: of each layer's weights, `[out, in]`, by its name.
        total: salient weights to distribute.

    Returns:
        k by the layer's name.

    >>> by_loss({"a": torch.tensor([[2.0, 1.0]]), "b": torch.tensor([[3.0, -1.0]])}, 2)
    {'a': 1, 'b': 1}
    """
    if not scores:
        return {}
    best = torch.empty(0)
    for values in scores.values():
        part = values.flatten().topk(min(total, values.numel())).values.cpu()
        best = torch.cat([best, part]).topk(min(total, best.numel() + part.numel())).values
    least = max(0.0, float(best[-1])) if total else math.inf
    counts = {name: int((values > least).sum()) if total else 0 for name, values in scores.items()}
    left = total - sum(counts.values()) if least else 0
    for name, values in scores.items():  # equal ones: those of the first layers
        more = min(left, int((values == least).sum()))
        counts[name], left = counts[name] + more, left - more
    return counts


def affordable(layers: Mapping[str, BudgetItem], config: SVDQConfig) -> int:
    """Number of salient weights for all layers together: what `target_bits` pay for, or else k of each.

    Args:
        layers: what the budget is spent on, by name.
        config: the config.

    Raises:
        ValueError: fewer bits than the layers take with nothing salient, or more than with everything.
    """
    if config.target_bits is None:
        ks = config.layer_k or {}
        return sum(
            salient_count(ks.get(name, config.k), one.out, one.in_features) for name, one in layers.items()
        )
    nothing = config.replace(k=0).scheme
    specs = [part_specs(layer.out, layer.in_features, nothing).values() for layer in layers.values()]
    fixed = 8 * sum(math.prod(spec.shape) * spec.dtype.itemsize for layer in specs for spec in layer)
    weights = sum(layer.numel for layer in layers.values())
    count = math.floor((config.target_bits * weights - fixed) / SALIENT_BITS + 1e-9)
    if not 0 <= count <= weights:
        least, most = fixed / weights, fixed / weights + SALIENT_BITS
        raise ValueError(
            f"target_bits={config.target_bits}: the {len(layers)} layers to quantize take {least:.4f} bits "
            f"per weight with nothing salient and {most:.4f} with everything; give a number from "
            f"{math.ceil(least * 1000) / 1000:.3f} on, or choose fewer bits or larger groups"
        )
    return count


def _same_count(layers: Mapping[str, BudgetItem], total: int) -> dict[str, int]:
    """The same k in every layer; a layer with fewer weights gets as many as it has."""
    k = total // len(layers)
    return {name: min(k, layer.numel) for name, layer in layers.items()}


def followed_budget(
    layers: Mapping[str, BudgetItem], config: SVDQConfig, followed: Container[str]
) -> tuple[int, dict[str, int]]:
    """The salient weights that go by the loss, and k of the layers of which it tells nothing.

    Those have what `k` says, or else their share of a budget by their size.

    Args:
        layers: what the budget is spent on, by name.
        config: the config.
        followed: names of the layers of which the loss tells something.

    Returns:
        How many go to the layers that are followed, and k of each of the others, by name.

    Raises:
        ValueError: see `affordable`.
    """
    total = affordable(layers, config)
    shares = _same_share(layers, total)
    others = {
        name: shares[name] if config.target_bits else salient_count(config.k, layer.out, layer.in_features)
        for name, layer in layers.items()
        if name not in followed
    }
    return total - sum(others.values()), others


def _same_share(layers: Mapping[str, BudgetItem], total: int) -> dict[str, int]:
    weights = sum(layer.numel for layer in layers.values())
    return {name: total * layer.numel // weights for name, layer in layers.items()}
