"""One budget of bits for a whole model: which layer gets how many salient weights?

Each layer is quantized at a few numbers of salient weights, and the budget goes, piece by piece, to where
a salient weight lowers the sum of the layers' squared relative errors most. Errors of layers add up so:
the exchange of one bit between two layers is judged by what it does to the sum alone. Rounding is
measured without error feedback. Not here: what a layer's weight is (`weight`), which layers there are
(`selection`).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor
from transformers.utils import logging as hf_logging

from svdq_hf.calibration.inputs import InputStatistics
from svdq_hf.config import SVDQConfig
from svdq_hf.format.parts import part_specs
from svdq_hf.quantize.weight import errors_at

SALIENT_BITS = 96
"""Of one salient weight: its value, its row and its column."""

STEPS = (0.0, 0.5, 1.0, 2.0, 4.0)
"""Where a layer's error is measured, in multiples of its even share of the budget."""


class BudgetItem(NamedTuple):
    """A layer `[out, in]` to spend bits on; weight: called when it is needed, and let go."""

    out: int
    in_features: int
    weight: Callable[[], Tensor]

    @property
    def numel(self) -> int:
        """Its weights."""
        return self.out * self.in_features


@dataclass
class Measured:
    """What a layer's relative error is at some numbers of salient weights."""

    error: dict[int, float]

    def gains(self) -> list[tuple[float, int, int]]:
        """Pieces of its lower convex hull, `(squared error saved per weight, from k, to k)`, best first."""
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
    """The config with `layer_k`, where its `target_bits` are not spent yet; else as it is.

    The layers' relative errors, squared and as they are, sum up to no more than with one k for all.

    Raises:
        ValueError: fewer bits than the layers take with nothing salient, or more than with everything.
    """
    if config.target_bits is None or config.layer_k is not None:
        return config
    total = _affordable(layers, config, config.target_bits)
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
    """How many each layer gets, `total` in all: the pieces that save most come first, the last one in part.

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


def _affordable(layers: Mapping[str, BudgetItem], config: SVDQConfig, target_bits: float) -> int:
    """How many salient weights `target_bits` pay for."""
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
    """The same k in every layer, as far as small ones have so many weights."""
    k = total // len(layers)
    return {name: min(k, layer.numel) for name, layer in layers.items()}


def _same_share(layers: Mapping[str, BudgetItem], total: int) -> dict[str, int]:
    weights = sum(layer.numel for layer in layers.values())
    return {name: total * layer.numel // weights for name, layer in layers.items()}
