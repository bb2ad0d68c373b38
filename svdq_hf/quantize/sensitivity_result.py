"""What rounding a model costs its loss, by weight, row, layer and kind of layer: the result of a measurement.

Not here: the measuring (`quantize.sensitivity`), tables and pictures (`cli.sensitivity`,
`evaluation.sensitivity_picture`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

TOP = 0.005
"""The share of weights that the paper gives back."""


@dataclass(frozen=True)
class LayerSensitivity:
    """What rounding one layer costs.

    Attributes:
        name: of the layer.
        shape: of its weight, `(out, in)`.
        pqi: sum over its weights: its part of the change of the loss, in nats.
        first_order: the same by the gradient at the dense weights alone (Taylor).
        top_share: of the sum of all positive terms, the part that the 0.5 % largest hold.
        rows: sum over the weights of each row.
    """

    name: str
    shape: tuple[int, int]
    pqi: float
    first_order: float
    top_share: float
    rows: tuple[float, ...] = field(repr=False)

    def to_dict(self, *, rows: bool = True) -> dict[str, Any]:
        """All figures, in types that JSON has.

        Args:
            rows: whether the sums of rows are among them.
        """
        names = [one.name for one in fields(self) if rows or one.name != "rows"]
        return {name: getattr(self, name) for name in names}


def layer_sensitivity(name: str, terms: Tensor, first_order: float) -> LayerSensitivity:
    """What rounding one layer costs, from the PQI of its weights.

    Args:
        name: of the layer.
        terms: PQI of each weight, `[out, in]`, float32.
        first_order: sum of the same by the gradient at the dense weights alone.
    """
    (out, in_features), rows = terms.shape, terms.sum(1, dtype=torch.float64)
    positive = terms.clamp(min=0).flatten()
    total = float(positive.sum(dtype=torch.float64))
    top = positive.topk(max(1, round(TOP * positive.numel()))).values
    share = float(top.sum(dtype=torch.float64)) / total if total else 0.0
    sums = tuple(rows.tolist())
    return LayerSensitivity(name, (out, in_features), float(rows.sum()), first_order, share, sums)


@dataclass(frozen=True)
class Sensitivity:
    """What rounding a model's layers costs, as predicted by PQI and as measured.

    Attributes:
        layers: the largest cost first.
        dense_loss: mean loss of the dense model on the batches.
        rounded_loss: with every layer rounded.
        steps: points of the integral.
        terms: PQI of each weight, `[out, in]`, float32, by the layer's name: in a temporary file that is
            mapped into memory, and goes with this result.
    """

    layers: list[LayerSensitivity]
    dense_loss: float
    rounded_loss: float
    steps: int
    terms: Mapping[str, Tensor] = field(repr=False, compare=False)

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

    def to_dict(self, *, rows: bool = True) -> dict[str, Any]:
        """All figures but those of single weights, in types that JSON has.

        Args:
            rows: whether the sums of rows are among them.
        """
        names = ("change", "predicted", "first_order", "dense_loss", "rounded_loss", "steps")
        layers = [layer.to_dict(rows=rows) for layer in self.layers]
        return {name: getattr(self, name) for name in names} | {"layers": layers}
