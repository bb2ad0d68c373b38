"""Peaks of layers: the largest outputs of each, with the inputs and the row of the weight that made them.

Recorded by forward hooks in whatever passes a training loop or an evaluation makes. Padding tokens, which a
batch's mask hides, are left out. Not here: which singular components make a peak (`core.spectrum`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from svdq_hf.calibration.inputs import mask_of, masks_of
from svdq_hf.core.spectrum import kurtosis, outlier_ratio

MOST_TOKENS = 16
"""Tokens kept of each layer, those with the largest outputs: outliers are few, and in few tokens."""


@dataclass
class Peaks:
    """The largest outputs of one layer.

    Attributes:
        inputs: the tokens that made them, `[peaks, in]`, float32.
        units: row of the weight that made each, `[peaks]`, int64.
        outputs: the outputs, `[peaks]`, float32, the largest absolute value first.
        outlier_ratio: largest over median absolute output; this and the next are the highest of the passes.
        input_ratio: the same of the inputs.
        kurtosis: of the outputs.
    """

    inputs: Tensor
    units: Tensor
    outputs: Tensor
    outlier_ratio: float
    input_ratio: float
    kurtosis: float

    @classmethod
    def of(cls, inputs: Tensor, outputs: Tensor) -> "Peaks":
        """The peaks of one pass.

        Args:
            inputs: `[tokens, in]`.
            outputs: `[tokens, out]`.
        """
        units = outputs.abs().argmax(1)
        largest = outputs.gather(1, units.unsqueeze(1)).squeeze(1).float()
        kept = largest.abs().topk(min(MOST_TOKENS, len(largest))).indices
        figures = outlier_ratio(outputs), outlier_ratio(inputs), kurtosis(outputs)
        return cls(inputs[kept].float(), units[kept], largest[kept], *figures)

    def joined(self, other: "Peaks") -> "Peaks":
        """The peaks of both."""
        inputs, units, outputs = (
            torch.cat([getattr(self, name), getattr(other, name)]) for name in ("inputs", "units", "outputs")
        )
        kept = outputs.abs().topk(min(MOST_TOKENS, len(outputs))).indices
        figures = (
            max(getattr(self, name), getattr(other, name))
            for name in ("outlier_ratio", "input_ratio", "kurtosis")
        )
        return Peaks(inputs[kept], units[kept], outputs[kept], *figures)


class PeakRecorder:
    """Forward hooks that keep the peaks of some layers of a model, while it is watching.

    Args:
        model: the model; its forward pass shows the mask of a batch.
        layers: layers with inputs `[..., in]` and outputs `[..., out]`, by name.
        training: whether only passes with gradients count, so that an evaluation in between does not.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module], *, training: bool) -> None:
        self.model, self.layers, self.training = model, layers, training
        self.peaks: dict[str, Peaks] = {}
        self._masks: list[Tensor] = []
        self._hooks: list[Any] = []

    def watch(self) -> None:
        """Forget what was recorded, and record from now on."""
        self.peaks = {}
        if not self._hooks:
            self._hooks = [self.model.register_forward_pre_hook(self._see_batch, with_kwargs=True)]
            self._hooks += [
                layer.register_forward_hook(_Recorder(self, name)) for name, layer in self.layers.items()
            ]

    def stop(self) -> None:
        """Record no more; the model is without hooks again."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._masks = [], []

    def _see_batch(self, module: nn.Module, arguments: Any, named: dict[str, Any]) -> None:
        self._masks = masks_of(named)

    @torch.no_grad()
    def add(self, name: str, inputs: Tensor, outputs: Tensor) -> None:
        """Add the inputs `[..., in]` and outputs `[..., out]` of one call of a layer."""
        x, y = (values.detach().reshape(-1, values.shape[-1]) for values in (inputs, outputs))
        mask = mask_of(name, tuple(inputs.shape[:-1]), self._masks)
        if mask is not None:
            counted = mask.reshape(-1).to(x.device)
            x, y = x[counted], y[counted]
        if len(x):
            found, before = Peaks.of(x, y), self.peaks.get(name)
            self.peaks[name] = found if before is None else before.joined(found)


@dataclass
class _Recorder:
    """The forward hook of one layer."""

    recorder: PeakRecorder
    name: str

    def __call__(self, module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        if torch.is_grad_enabled() or not self.recorder.training:
            self.recorder.add(self.name, arguments[0], output)
