"""Layers whose spectrum can decay: the weight that each multiplies with, and where its gradient goes.

A dense layer trains its weight, a LoRA layer of PEFT its factors A and B, and a quantized layer its salient
weights; the decay is that of the whole weight each time, and the chain rule brings it to what trains. Sharded
parameters (FSDP2's DTensor) are gathered to be decomposed, and their gradient is added to the local rows. Not
here: experts and embeddings, which are no linear layers; which values decay (`training.spectral_decay`).
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from transformers.pytorch_utils import Conv1D

from svdq_hf.format.decode import reconstruct
from svdq_hf.nn.linear import SVDQLinear
from svdq_hf.quantize.code_inspection import is_linear
from svdq_hf.quantize.kept_dense import KeptDense
from svdq_hf.quantize.selection import heads


class DecayedLayer(Protocol):
    """A layer with a weight `[out, in]`, of which something trains."""

    @property
    def module(self) -> Any:
        """The module of the model."""

    def weight(self) -> Tensor:
        """The whole weight that the layer multiplies with, `[out, in]`, detached."""

    def trained(self) -> list[nn.Parameter]:
        """What of it trains."""

    def add_gradient(self, left: Tensor, right: Tensor) -> None:
        """Add a gradient by the weight, `left [out, k] @ right [in, k].T`, to that of what trains."""


@dataclass(frozen=True)
class DenseLayer:
    """`nn.Linear`, or `Conv1D`, which stores its weight as `[in, out]`."""

    module: nn.Module

    def weight(self) -> Tensor:
        """The weight `[out, in]`."""
        stored = whole(self._parameter)
        return stored.T if isinstance(self.module, Conv1D) else stored

    def trained(self) -> list[nn.Parameter]:
        """The weight, unless it is frozen."""
        return [self._parameter] if self._parameter.requires_grad else []

    def add_gradient(self, left: Tensor, right: Tensor) -> None:
        """Add `left [out, k] @ right [in, k].T`."""
        if self.trained():
            flipped = isinstance(self.module, Conv1D)
            _add(self._parameter, *((right, left) if flipped else (left, right)))

    @property
    def _parameter(self) -> nn.Parameter:
        return self.module.weight  # type: ignore[return-value]


@dataclass(frozen=True)
class SalientLayer:
    """A quantized layer: the weight is `dense + salient`, and the salient values train."""

    module: SVDQLinear

    def weight(self) -> Tensor:
        """The dequantized weight `[out, in]`."""
        parts = {name: whole(part) for name, part in self.module.parts().items()}
        return reconstruct(parts, self.module.in_features, self.module.scheme)

    def trained(self) -> list[nn.Parameter]:
        """The salient values, unless they are frozen, or none."""
        values = self.module.salient_values
        return [values] if values.requires_grad and values.numel() else []

    def add_gradient(self, left: Tensor, right: Tensor) -> None:
        """Add `left [out, k] @ right [in, k].T` at the salient positions."""
        if self.trained():
            rows, columns = (
                whole(positions).long()
                for positions in (self.module.salient_rows, self.module.salient_columns)
            )
            at_each = (left[rows] * right[columns]).sum(1, keepdim=True)
            _add(self.module.salient_values, at_each, at_each.new_ones(1, 1))


@dataclass(frozen=True)
class LoraLayer:
    """PEFT's LoRA layer: `W + scaling * B @ A` over its active adapters, on a dense or a quantized base."""

    module: Any
    base: DenseLayer | SalientLayer

    def weight(self) -> Tensor:
        """The merged weight `[out, in]`, float32; nothing is merged in the model."""
        total = self.base.weight().float()
        for down, up, scaling in self._adapters():
            total = total + scaling * (whole(up).float() @ whole(down).float())
        return total

    def trained(self) -> list[nn.Parameter]:
        """The factors of the active adapters, and the base's weight where it trains too."""
        factors = [factor for down, up, _ in self._adapters() for factor in (down, up)]
        return self.base.trained() + [factor for factor in factors if factor.requires_grad]

    def add_gradient(self, left: Tensor, right: Tensor) -> None:
        """Add `left [out, k] @ right [in, k].T` times A to B's gradient, and B times it to A's."""
        self.base.add_gradient(left, right)
        for down, up, scaling in self._adapters():
            if up.requires_grad:
                _add(up, left, scaling * (whole(down).to(right) @ right))
            if down.requires_grad:
                _add(down, scaling * (whole(up).to(left).T @ left), right)

    def _adapters(self) -> Iterator[tuple[nn.Parameter, nn.Parameter, float]]:
        """A `[r, in]`, B `[out, r]` and scaling of each active adapter that is not merged."""
        if not self.module.disable_adapters:
            for name in self.module.active_adapters:
                if name in self.module.lora_A and name not in self.module.merged_adapters:
                    up = self.module.lora_B[name].weight
                    yield self.module.lora_A[name].weight, up, self.module.scaling[name]


def decayed_layers(model: nn.Module, names: Iterable[str] | None) -> dict[str, DecayedLayer]:
    """The linear layers of a model's base of which something trains; heads are left out.

    Args:
        model: the model, dense, quantized, or PEFT's; not a wrapper of it.
        names: of layers, as in `modules_to_not_convert`; None: all.

    Returns:
        The layers by name, in the model's order.

    Raises:
        ValueError: there is none, a name matches none, an adapter is no plain LoRA, or a weight no matrix.
    """
    found = {name: layer for name, layer in linear_layers(model) if layer.trained()}
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no linear layer that trains: is everything frozen? Heads and tied "
            "weights do not count"
        )
    asked = None if names is None else KeptDense(names)
    for name in [] if asked is None else asked.all:
        if not any(KeptDense([name]).keeps(layer) for layer in found):
            raise ValueError(
                f"layers: {name!r} matches no linear layer that trains, such as {next(iter(found))}"
            )
    chosen = {name: layer for name, layer in found.items() if asked is None or asked.keeps(name)}
    for name, layer in chosen.items():
        _check(name, layer)
    return chosen


def linear_layers(model: nn.Module) -> Iterator[tuple[str, DecayedLayer]]:
    """The linear layers of a model's base, dense, quantized or adapted, with their names; trained or not.

    Args:
        model: the model; heads and tied weights are left out.
    """
    get_base = getattr(model, "get_base_model", None)
    base = get_base() if callable(get_base) else model
    output = getattr(base, "get_output_embeddings", lambda: None)()
    outside = tuple(f"{name}." for name in heads(base))
    counts: dict[int, int] = {}
    for parameter in (one for _, one in base.named_parameters(remove_duplicate=False)):
        counts[id(parameter)] = counts.get(id(parameter), 0) + 1
    inside: tuple[str, ...] = ()
    for name, module in base.named_modules():
        layer = _layer_of(name, module)
        if layer is None or module is output or f"{name}.".startswith((*outside, *inside)):
            continue
        inside = (f"{name}.",) if isinstance(layer, LoraLayer) else inside
        if all(counts.get(id(one), 1) == 1 for one in layer.trained()):  # tied to no other
            yield name, layer


def _layer_of(name: str, module: Any) -> DecayedLayer | None:
    if type(module) is SVDQLinear:
        return SalientLayer(module)
    if hasattr(module, "lora_A") and hasattr(module, "get_base_layer"):
        base = _layer_of(name, module.get_base_layer())
        if not isinstance(base, DenseLayer | SalientLayer):
            return None
        if any(getattr(module, "lora_variant", {}).values()):
            raise ValueError(
                f"{name}: spectral decay knows plain LoRA only; take DoRA and other variants away"
            )
        return LoraLayer(module, base)
    return DenseLayer(module) if is_linear(module) else None


def _check(name: str, layer: DecayedLayer) -> None:
    """Refuse flat and otherwise sharded parameters, whose rows cannot be told.

    Raises:
        ValueError: it names the layer.
    """
    for parameter in layer.trained():
        if parameter.ndim == 0 or (parameter.ndim == 1 and not isinstance(layer, SalientLayer)):
            raise ValueError(
                f"{name}: its weight is a flat or empty piece {list(parameter.shape)}, as of FSDP1 and "
                "DeepSpeed ZeRO-3, and has no spectrum; shard with FSDP2's fully_shard"
            )
        if isinstance(parameter, DTensor):
            for placement in parameter.placements:
                if not (type(placement) is Replicate or (type(placement) is Shard and placement.dim == 0)):
                    raise ValueError(
                        f"{name}: sharded as {placement}; spectral decay takes rows sharded by FSDP2's "
                        "fully_shard, or replicas, and no tensor parallelism"
                    )


def whole(tensor: Tensor) -> Tensor:
    """A tensor `[...]`, detached, gathered from all processes where it is a DTensor."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _add(parameter: nn.Parameter, left: Tensor, right: Tensor) -> None:
    """Add `left [n, k] @ right [m, k].T` to a gradient `[n, m]` or `[n]`, or to its local rows."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    gradient = parameter.grad
    if isinstance(gradient, DTensor):
        for dim, placement in enumerate(gradient.placements):
            if isinstance(placement, Shard):  # by rows, in torch.chunk's pieces
                pieces, mine = (
                    left.chunk(gradient.device_mesh.size(dim)),
                    gradient.device_mesh.get_local_rank(dim),
                )
                left = pieces[mine] if mine < len(pieces) else left[:0]
        gradient = gradient.to_local()
    gradient.add_((left @ right.T).to(gradient.dtype).view_as(gradient))
