"""ReQuant: the salient weights of a whole model, chosen under one budget by what they cost the loss.

1. Every layer is rounded with nothing salient, and the size of the PQI of its weights is measured.
2. `OUTLIERS` of the budget go to the layers in proportion to the sums of its squares, and in a layer to the
   weights that are largest in their group: without them the scales of the others are finer.
3. The layers are rounded again without these, and PQI is evaluated anew: the largest of the whole model are
   given back, in `ROUNDS` of which each spends half of what is left, and the last all of it.

Each time a layer is rounded again its salient weights stay out of it, and the errors that remain are other
ones. With error feedback by batches of the user the rounds feed errors back as well, as the layers will be
rounded in the end; by batches that the model made, which are damped more, they need not
(docs/results/pqi.md). The result is an order of weights, for the score "requant": quantizing by it stores
nothing new. Not here: PQI (`quantize.sensitivity`), and how many weights the budget pays for
(`quantize.budget`).

Source: arXiv 2503.01901 has these steps. Its algorithms were not at hand: how the outliers are shared out,
which weights they are, that PQI counts by its size, and how much each round spends are ours.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from svdq_hf.calibration.inputs import InputStatistics
from svdq_hf.config import SVDQConfig
from svdq_hf.core.topk import top_positions
from svdq_hf.quantize.budget import by_loss
from svdq_hf.quantize.layer import matrix_of
from svdq_hf.quantize.rounding_lines import Kept, lines_of
from svdq_hf.quantize.sensitivity import pqi
from svdq_hf.quantize.weight import score_weight

OUTLIERS = 0.25
"""Share of the budget that goes to outliers."""

ROUNDS = 2
"""Times that weights are given back; the paper takes a few."""


@dataclass
class ReQuant:
    """A model on its way to be quantized by ReQuant.

    Attributes:
        model: the dense model.
        layers: linear layers of it, by name.
        config: how they are rounded.
        batches: what the model's loss takes.
        seen: statistics of the layers' inputs by name, where errors are fed back in the rounds.
    """

    model: nn.Module
    layers: Mapping[str, nn.Module]
    config: SVDQConfig
    batches: Sequence[Any]
    seen: Mapping[str, InputStatistics]

    def order(self, total: int) -> dict[str, Tensor]:
        """The order in which weights are given back.

        Args:
            total: salient weights of all layers together.

        Returns:
            `[out, in]`, float32, by the layer's name: infinity for weights that are given back before the
            last round, for the others the size of their PQI then.

        Raises:
            ValueError: see `calibration.pqi.walk` and `quantize_weight`.
        """
        kept = self._outliers(round(OUTLIERS * total))
        for left in reversed(range(ROUNDS)):
            sizes = self._sizes(kept, ROUNDS + 1 - left)
            for name, chosen in kept.items():
                sizes[name].view(-1)[chosen] = math.inf
            if left:
                kept = _highest(sizes, (_count(kept) + total) // 2)
        return sizes

    def _outliers(self, total: int) -> Kept:
        """The outliers of each layer, as many as its share of all costs."""
        costs = {name: float(sizes.square().sum()) for name, sizes in self._sizes({}, 1).items()}
        every = sum(costs.values()) or 1.0
        plain, kept = self.config.replace(saliency=self.config.plain_score), {}
        for name, module in self.layers.items():
            weight = matrix_of(module)
            k = min(weight.numel(), int(total * costs[name] / every))
            kept[name] = _first(score_weight(weight, plain, name).scores, k)
        return kept

    def _sizes(self, kept: Kept, number: int) -> dict[str, Tensor]:
        """The size of each weight's PQI, where some are salient, by the pass of a number from 1 on."""
        lines = lines_of(self.layers, self.config, kept, self.seen)
        return pqi(self.model, lines, self.batches, pass_of=f"{number} of {ROUNDS + 1}")


def _highest(scores: Mapping[str, Tensor], total: int) -> Kept:
    return {name: _first(scores[name], k) for name, k in by_loss(scores, total).items()}


def _first(scores: Tensor, k: int) -> Tensor:
    """Places of the k highest scores `[out, in]`."""
    rows, columns = top_positions(scores, k)
    return (rows.long() * scores.shape[1] + columns.long()).cpu()


def _count(kept: Kept) -> int:
    return sum(chosen.numel() for chosen in kept.values())
