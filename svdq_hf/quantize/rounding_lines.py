"""Lines of a model's layers from their dense to their rounded weights, and sums over them.

What `calibration.pqi` walks along, made from a config. Rounded weights are kept packed, and sums in a file
that is mapped into memory. Not here: what the sums tell (`quantize.sensitivity`, `quantize.requant`).
"""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from svdq_hf.calibration.inputs import InputStatistics
from svdq_hf.calibration.mapped import mapped_zeros
from svdq_hf.calibration.pqi import Line, Take
from svdq_hf.config import SVDQConfig
from svdq_hf.core.saliency import Scored
from svdq_hf.format.decode import reconstruct
from svdq_hf.quantize.layer import matrix_of
from svdq_hf.quantize.weight import quantize_weight

Kept = Mapping[str, Tensor]
"""Salient weights by the layer's name: places in its matrix `[out, in]`, counted row by row, `[k]`, int64."""


def lines_of(
    layers: Mapping[str, nn.Module],
    config: SVDQConfig,
    kept: Kept | None = None,
    seen: Mapping[str, InputStatistics] | None = None,
) -> dict[str, Line]:
    """The lines from dense to rounded weights.

    Args:
        layers: linear layers, by name.
        config: how they are rounded; its score and its k are not used.
        kept: the salient weights, which do not move; of layers that are missing, none.
        seen: statistics of the layers' inputs by name, where the config's error feedback is to be followed;
            of layers that are missing, errors are not fed back.

    Raises:
        ValueError: see `quantize_weight`.
    """
    salient, inputs, nowhere = kept or {}, seen or {}, torch.empty(0, dtype=torch.int64)
    return {
        name: _line(name, module, config, salient.get(name, nowhere), inputs.get(name))
        for name, module in layers.items()
    }


def _line(
    name: str, module: nn.Module, config: SVDQConfig, kept: Tensor, inputs: InputStatistics | None
) -> Line:
    weight = matrix_of(module)
    scores = torch.zeros(weight.numel(), device=weight.device)
    scores[kept.to(scores.device)] = 1.0
    feedback = False if inputs is None else config.error_feedback
    chosen = config.replace(
        k=kept.numel(), saliency="magnitude", target_bits=None, layer_k=None, error_feedback=feedback
    )
    parts, _ = quantize_weight(weight, chosen, name, inputs, Scored(scores.view(weight.shape), {}))
    rounded = partial(reconstruct, parts, weight.shape[1], chosen.scheme)
    return Line(module, partial(matrix_of, module), rounded)


class GradientSums:
    """Sums of gradients along lines, or of their squares, a matrix for each layer.

    Args:
        lines: of the layers, by name.

    Attributes:
        sums: `[out, in]`, float32, on the CPU, by the layer's name.
    """

    def __init__(self, lines: Mapping[str, Line]) -> None:
        self.lines = lines
        self.sums = mapped_zeros({name: tuple(line.dense().shape) for name, line in lines.items()})

    def take(self, weight: float) -> Take:
        """What receives gradients `[out, in]`, each of which counts with a weight.

        Args:
            weight: of each, such as 1 over the number of steps.
        """

        def add(name: str, gradient: Tensor, place: float) -> None:
            self.sums[name].add_(gradient.cpu(), alpha=weight)

        return add

    def take_square(self, name: str, gradient: Tensor, place: float) -> None:
        """Receive a gradient `[out, in]`, of which the square is summed up."""
        self.sums[name].add_(gradient.square().cpu())

    def terms(self) -> dict[str, Tensor]:
        """The sums times the way of each weight, its part of the change, `[out, in]`; uses the sums up."""
        return {name: sums.mul_(self.lines[name].difference().cpu()) for name, sums in self.sums.items()}

    def sizes(self) -> dict[str, Tensor]:
        """Of squares: the size of these parts over all sequences, `[out, in]`; uses the sums up."""
        return {
            name: sums.sqrt_().mul_(self.lines[name].difference().abs_().cpu())
            for name, sums in self.sums.items()
        }
