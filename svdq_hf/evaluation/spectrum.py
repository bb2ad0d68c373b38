"""Spectra of a model's layers: leading singular values, and with a text the outliers that they make.

A quantized layer is dequantized for its turn. Not here: the command (`cli.spectrum`), the picture
(`evaluation.spectrum_picture`), and taking outliers away (`training.spectral_decay`).
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from svdq_hf.calibration.inputs import call, evaluating
from svdq_hf.core.spectrum import dominance, stable_rank
from svdq_hf.core.svd import principal
from svdq_hf.training.decayed_layers import linear_layers
from svdq_hf.training.peaks import PeakRecorder, Peaks

VALUES = 10
"""Singular values told of a layer."""

COMPONENTS = 3
"""Most components of PCDR, as in spectral decay."""


@dataclass(frozen=True)
class Spectrum:
    """What the spectrum of one layer is, and what it does to activations.

    Attributes:
        name: of the layer.
        shape: of its weight, (out, in).
        values: its largest singular values, at most ten.
        stable_rank: squared Frobenius norm over the squared largest value.
        pcdr: share of the leading 1, 2 and 3 components in the largest outputs; None without a text, or where
            no pass reached the layer. Likewise the following.
        outlier_ratio: largest over median absolute output.
        input_ratio: the same of the inputs.
        kurtosis: of the outputs.
    """

    name: str
    shape: tuple[int, int]
    values: list[float]
    stable_rank: float
    pcdr: list[float] | None = None
    outlier_ratio: float | None = None
    input_ratio: float | None = None
    kurtosis: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """All fields, in types that JSON has."""
        return asdict(self)


def measure_spectra(model: nn.Module, batches: Iterable[Any] = ()) -> list[Spectrum]:
    """The spectra of a model's linear layers; heads and tied weights are left out.

    Args:
        model: a dense or a quantized model.
        batches: each what the model takes, to see its activations; none: the weights alone.

    Returns:
        A row for each layer, in the model's order.

    Raises:
        ValueError: the model has no linear layer.

    >>> (row,) = measure_spectra(nn.Sequential(nn.Linear(3, 3)), [torch.eye(3)])
    >>> row.name, row.shape, len(row.values), row.pcdr is not None
    ('0', (3, 3), 3, True)
    """
    layers = dict(linear_layers(model))
    if not layers:
        raise ValueError(f"{type(model).__name__} has no linear layer outside of its heads")
    recorder = PeakRecorder(model, {name: layer.module for name, layer in layers.items()}, training=False)
    recorder.watch()
    try:
        with evaluating(model):
            for batch in batches:
                call(model, batch)
    finally:
        recorder.stop()
    with torch.no_grad():
        return [_measured(name, layer.weight(), recorder.peaks.get(name)) for name, layer in layers.items()]


def _measured(name: str, weight: Tensor, peaks: Peaks | None) -> Spectrum:
    found = principal(weight, VALUES)
    shape = (weight.shape[0], weight.shape[1])
    values = found.s.tolist()
    plain = Spectrum(name, shape, values, stable_rank(weight, values[0]))
    if peaks is None:
        return plain
    shares = dominance(found.leading(COMPONENTS), peaks.inputs, peaks.units, peaks.outputs).tolist()
    figures = (peaks.outlier_ratio, peaks.input_ratio, peaks.kurtosis)
    return Spectrum(name, shape, values, plain.stable_rank, shares, *figures)
