"""Spectral decay (S2D): a penalty on only the largest singular values of a weight, while fine-tuning.

Layers whose largest outputs are made by a few leading singular components lose these outliers, and are easier
to quantize afterwards; all other layers train as ever. Source: arXiv 2602.14432; its authors published no
code. Not here: Trainer's callback (`training.spectral_decay_callback`), and the weight and the gradient of
each kind of layer (`training.decayed_layers`).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from svdq_hf.core.arguments import checked_arguments
from svdq_hf.core.spectrum import decay_factors, decay_penalty, dominance, least_count
from svdq_hf.core.svd import Principal, principal
from svdq_hf.training.agreement import agree, are_several
from svdq_hf.training.decayed_layers import decayed_layers
from svdq_hf.training.peaks import PeakRecorder

SPARE = 5
"""Triplets kept beyond `k_max`: the next decomposition starts from a space that holds the leading ones."""


@dataclass(frozen=True)
class LayerSpectrum:
    """What was last seen of one layer.

    Attributes:
        values: leading singular values, `[k_max]`, falling.
        shares: PCDR for k = 1 ... k_max, `[k_max]`.
        count: how many values decay; 0: the layer is not flagged.
        outlier_ratio: largest over median absolute output.
    """

    values: Tensor
    shares: Tensor
    count: int
    outlier_ratio: float


class SpectralDecay:
    """Spectral decay of a model that is trained, for a loop of one's own.

        decay = SpectralDecay(model)
        for batch in batches:
            model(**batch).loss.backward()
            decay.step()  # between backward and the optimizer's step
            optimizer.step()
            optimizer.zero_grad()

    Every `every` steps the leading singular triplets of each layer are computed, and the layers flagged whose
    largest outputs they make; in between they are reused as they are, as in the paper. In several processes
    (DDP, FSDP2) every process calls `step`, after the gradients were reduced, and adds the same. A sharded
    weight is gathered, one layer after the other, when its triplets are computed.

    Args:
        model: the model, before or after it is wrapped or sharded.
        strength: lambda, factor of the penalty `lambda / (n + 1) * sum(s ** (n + 1))`.
        power: n, at least 1; with 1 and all values it is weight decay.
        tau: share of the largest outputs (PCDR) that flags a layer, from 0 (every layer) to 1.
        k_max: most singular values of a layer that decay.
        every: steps between two decompositions.
        layers: names of the layers to look at, as in `modules_to_not_convert`; None: all that train.

    Raises:
        TypeError: an argument is of a wrong type.
        ValueError: a value out of range, or no layer of the model can decay.

    Source: arXiv 2602.14432.
    """

    @checked_arguments(model="load it first", layers="a list of names, such as ['output.dense']")
    def __init__(
        self,
        model: nn.Module,
        strength: float = 5e-4,
        power: float = 2,
        tau: float = 0.95,
        k_max: int = 3,
        every: int = 100,
        layers: Sequence[str] | None = None,
    ) -> None:
        _check_ranges(strength=strength, power=power, tau=tau, k_max=k_max, every=every)
        self.strength, self.power, self.tau, self.k_max, self.every = strength, power, tau, k_max, every
        self.steps = 0
        """Steps so far."""
        self.decompositions: Counter[str] = Counter()
        """Decompositions computed so far, by layer."""
        self.spectra: dict[str, LayerSpectrum] = {}
        """What was last seen of each layer."""
        model = _unwrapped(model)
        self.layers = decayed_layers(model, layers)
        modules = {name: layer.module for name, layer in self.layers.items()}
        self._peaks = PeakRecorder(model, modules, training=True)
        self._triplets: dict[str, Principal] = {}
        self._factors: dict[str, tuple[Tensor, Tensor]] = {}
        self._peaks.watch()

    @property
    def flagged(self) -> dict[str, LayerSpectrum]:
        """The layers that decay now."""
        return {name: seen for name, seen in self.spectra.items() if seen.count}

    @property
    def penalty(self) -> float:
        """The penalty of the flagged layers, by their last decomposition."""
        return sum(
            decay_penalty(seen.values[: seen.count], self.strength, self.power)
            for seen in self.flagged.values()
        )

    @torch.no_grad()
    def step(self, scale: float = 1.0) -> None:
        """Add the penalty's gradient to those of the model; call it once for each step of the optimizer.

        Args:
            scale: what the gradients are multiplied by: `scaler.get_scale()` where a GradScaler has not yet
                unscaled them.

        Raises:
            ValueError: no forward pass in training was seen since the object was made.
        """
        if self.steps % self.every == 0:
            self._decompose()
        for name, (left, right) in self._factors.items():
            self.layers[name].add_gradient(left * scale, right)
        self.steps += 1
        if self.steps % self.every == 0:
            self._peaks.watch()

    def close(self) -> None:
        """Take the hooks off the model."""
        self._peaks.stop()

    def _decompose(self) -> None:
        """Compute triplets and shares of every layer, and choose how many values decay."""
        self._peaks.stop()
        shares = {name: self._look_at(name, layer.weight()) for name, layer in self.layers.items()}
        ratios = {name: self._ratio(name) for name in self.layers}
        if not any(share.any() for share in shares.values()) and not are_several():
            raise ValueError(
                "no forward pass in training was seen: make SpectralDecay before the loop, and call step() "
                "after loss.backward()"
            )
        agree(self._triplets, shares, ratios)
        for name, found in self._triplets.items():
            self._choose(name, found, shares[name], ratios[name])

    def _look_at(self, name: str, weight: Tensor) -> Tensor:
        """Decompose a layer's weight `[out, in]`; returns PCDR `[k_max]`, zeros where no pass reached it."""
        found = principal(weight, self.k_max + SPARE, start=self._triplets.get(name)).contiguous()
        self._triplets[name] = found
        self.decompositions[name] += 1
        peaks = self._peaks.peaks.get(name)
        count = min(self.k_max, len(found.s))
        if peaks is None:
            return torch.zeros(count, device=found.s.device)
        shares = dominance(found.leading(count), peaks.inputs, peaks.units, peaks.outputs)
        if count == min(weight.shape):
            shares[-1] = 1.0  # nothing is beyond them
        return shares

    def _ratio(self, name: str) -> float:
        peaks = self._peaks.peaks.get(name)
        return 0.0 if peaks is None else peaks.outlier_ratio

    def _choose(self, name: str, found: Principal, shares: Tensor, ratio: float) -> None:
        count = least_count(shares, self.tau) if shares.any() else 0
        self.spectra[name] = LayerSpectrum(found.s[: len(shares)].cpu(), shares.cpu(), count, ratio)
        self._factors.pop(name, None)
        if count:
            self._factors[name] = decay_factors(found, count, self.strength, self.power)

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed training needs to go on bit for bit.

        Returns:
            "steps", and by layer its triplets, shares `[k_max]`, "outlier_ratio" and "decompositions".
        """
        return {"steps": self.steps, "layers": {name: self._state_of(name) for name in self.spectra}}

    def _state_of(self, name: str) -> dict[str, Any]:
        found, seen = self._triplets[name], self.spectra[name]
        tensors = {"u": found.u, "s": found.s, "v": found.v, "shares": seen.shares}
        return {
            **{part: tensor.cpu().contiguous() for part, tensor in tensors.items()},
            "sigma_ratio": found.sigma_ratio,
            "outlier_ratio": seen.outlier_ratio,
            "decompositions": self.decompositions[name],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; choices (strength, tau and so on) are those of this object.

        Args:
            state: what `state_dict` returned, for a model of the same layers.

        Raises:
            ValueError: the state is that of a model with other layers.
        """
        if state["layers"] and state["layers"].keys() != self.layers.keys():
            strange = sorted(state["layers"].keys() ^ self.layers.keys())
            raise ValueError(
                f"the state of spectral decay is that of other layers: {', '.join(strange[:3])}, ..."
            )
        self.steps = state["steps"]
        for name, parts in state["layers"].items():
            device = self.layers[name].trained()[0].device
            u, s, v = (parts[part].to(device) for part in ("u", "s", "v"))
            self._triplets[name] = Principal(u, s, v, parts["sigma_ratio"])
            self.decompositions[name] = parts["decompositions"]
            self._choose(name, self._triplets[name], parts["shares"], parts["outlier_ratio"])
        if self.steps % self.every:
            self._peaks.stop()
        else:
            self._peaks.watch()


def _check_ranges(strength: float, power: float, tau: float, k_max: int, every: int) -> None:
    if strength < 0 or power < 1:
        raise ValueError(f"strength={strength}, power={power}: must be from 0 on, and from 1 on")
    if not 0 <= tau <= 1:
        raise ValueError(f"tau={tau}: must be from 0 (every layer) to 1")
    if k_max < 1 or every < 1:
        raise ValueError(f"k_max={k_max}, every={every}: must be 1 or more")


def _unwrapped(model: Any) -> Any:
    """The model inside of `torch.compile`'s or DDP's wrapper."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        else:
            return model
