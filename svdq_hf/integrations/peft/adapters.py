"""Adapters of a whole quantized model: merged with the rounding measured, or started from the rounding error.

Sources of the start: LoftQ, arXiv 2310.08659 (its first step), and PiSSA, arXiv 2404.02948. Not here: the
layer (`integrations.peft.lora`).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from svdq_hf.calibration.inputs import call, evaluating
from svdq_hf.core.arguments import checked_arguments
from svdq_hf.core.svd import principal
from svdq_hf.integrations.peft.lora import PeftModel, SVDQLoraLinear, adapted_layers
from svdq_hf.nn.linear import SVDQLinear

_ADAPTED = "a quantized model with adapters: get_peft_model(model, ...)"


@dataclass(frozen=True)
class Merged:
    """Result of merging.

    Attributes:
        model: the quantized model.
        lost: by layer, the size of the rounding error over that of the adapter's change: 0.1 keeps
            nearly all of the change, 1 and more means that the error is as large.
        output_change: `|after - before| / |before|` of the model's first output, where before is with the
            adapter unmerged; None without a batch.
    """

    model: nn.Module
    lost: dict[str, float]
    output_change: float | None

    def __str__(self) -> str:
        mean = sum(self.lost.values()) / len(self.lost)
        text = f"merged into {len(self.lost)} quantized layers; rounding error over adapter, mean: {mean:.2f}"
        return text if self.output_change is None else f"{text}; outputs changed by {self.output_change:.2%}"


@checked_arguments(model=_ADAPTED)
@torch.no_grad()
def merge_adapters(model: nn.Module, batch: Any = None) -> Merged:
    """Add the active adapters to a quantized base and quantize the sums.

    The salient weights take up the adapter exactly, the others are rounded again. Layers that are dense are
    merged by PEFT. As in PEFT, the given model must not be used afterwards.

    Args:
        model: a PeftModel on a quantized base.
        batch: input of the model (a mapping of keyword arguments, a tuple, or one tensor), to measure how
            much its outputs change; None: not measured.

    Returns:
        The merged model, and what rounding cost.

    Raises:
        TypeError: an argument is of a wrong type (`WrongKind`, which is a ValueError as well).
        ValueError: no quantized layer has an adapter, the model is not PEFT's, or a layer's adapter cannot be
            merged (it has a NaN, or a bias that the layer lacks, or is switched off); nothing is changed.
    """
    layers = dict(adapted_layers(model))
    if not layers:
        raise ValueError("no quantized layer of this model has an adapter: get_peft_model(model, ...) first")
    if not isinstance(model, PeftModel):
        raise ValueError(
            f"these adapters were put on a {type(model).__name__} by itself, as add_adapter does; "
            "save_pretrained(FOLDER) them, and merge PeftModel.from_pretrained(base, FOLDER)"
        )
    adapters = list(model.active_adapters)
    for name, layer in layers.items():
        trouble = layer.why_not_merge(adapters)
        if trouble is not None:
            raise ValueError(f"{name}: {trouble}; it cannot be merged")
    before = None if batch is None else _output(model, batch)
    lost = {name: layer.requantize(adapters) for name, layer in layers.items()}
    merged = model.merge_and_unload()
    change = None
    if before is not None:
        change = float((_output(merged, batch) - before).norm() / before.norm())
    return Merged(merged, lost, change)


def _output(model: nn.Module, batch: Any) -> Tensor:
    with evaluating(model):
        found = call(model, batch)
    first = found[0] if not isinstance(found, Tensor) else found
    return first.float()


@checked_arguments(model=_ADAPTED, dense="the model that was quantized, its state dict or its folder")
@torch.no_grad()
def init_adapters_from_error(
    model: nn.Module, dense: nn.Module | Mapping[str, Tensor] | str | Path, adapter: str = "default"
) -> dict[str, tuple[float, float]]:
    """Start an adapter from the quantization error: `scaling * B @ A` is its best approximation of that rank.

    By truncated SVD of `W - Q(W)`, in closed form, without data. The base is not changed, so the adapter
    loads on it as any other.

    Args:
        model: a quantized model with a fresh adapter.
        dense: the model before quantizing, or its state dict (weights `[out, in]`), or the folder (or name on
            the Hub) that it is loaded from; a quantized model does not hold those weights.
        adapter: name of the adapter.

    Returns:
        By layer, `|W - Q| / |W|` without and with the adapter.

    Raises:
        TypeError: an argument is of a wrong type (`WrongKind`, which is a ValueError as well).
        ValueError: no quantized layer has this adapter, it has been trained already or its lora_alpha is not
            above 0, or `dense` lacks a layer's weight, or has another shape or values that were not
            quantized to these.

    Source: LoftQ, arXiv 2310.08659, first step; PiSSA, arXiv 2404.02948.
    """
    layers = {name: layer for name, layer in adapted_layers(model) if adapter in layer.lora_A}
    if not layers:
        raise ValueError(f"no quantized layer of this model has an adapter {adapter!r}")
    unscaled = [name for name, layer in layers.items() if layer.scaling[adapter] <= 0]
    if unscaled:
        raise ValueError(f"adapter {adapter!r}: lora_alpha must be above 0 for a start (at {unscaled[0]})")
    trained = [name for name, layer in layers.items() if layer.lora_B[adapter].weight.any()]
    if trained:
        raise ValueError(
            f"adapter {adapter!r} is not fresh (B of {trained[0]} is not zero), and would be overwritten: "
            "add a new one, with init_lora_weights=True"
        )
    weights = _dense_weights(model, dense)
    errors = {name: _error(name, layer, weights) for name, layer in layers.items()}  # before any is changed
    return {name: _start(layer, adapter, *errors[name]) for name, layer in layers.items()}


def _error(name: str, layer: SVDQLoraLinear, weights: Mapping[str, Tensor]) -> tuple[Tensor, float]:
    """`W - Q(W)`, `[out, in]`, and the norm of W."""
    base: SVDQLinear = layer.get_base_layer()
    weight = weights.get(f"{name}.weight")
    if weight is None:
        raise ValueError(f"{name}: the dense model has no weight for it; give the one that was quantized")
    weight = weight.detach().to(base.weight.device, torch.float32)
    weight = weight.T if base.transposed else weight
    if weight.shape != (base.out_features, base.in_features):
        shape = [base.out_features, base.in_features]
        raise ValueError(f"{name}: the dense weight is {list(weight.shape)}, the quantized one {shape}")
    error, size = weight - base.dequantize(), float(weight.norm())
    if not math.isfinite(size) or float(error.norm()) > size:
        raise ValueError(
            f"{name}: the dense weight is not the one that was quantized (they differ by more than its size)"
        )
    return error, size


def _start(layer: SVDQLoraLinear, adapter: str, error: Tensor, size: float) -> tuple[float, float]:
    down, up, scaling = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight, layer.scaling[adapter]
    found = principal(error, layer.r[adapter])
    rank = len(found.s)  # below r where the matrix has no more
    root = (found.s / scaling).sqrt()
    down.zero_()
    down[:rank] = (found.v * root).T.to(down.dtype)
    up[:, :rank] = (found.u * root).to(up.dtype)
    left = error - layer.delta([adapter])
    return float(error.norm()) / (size or 1), float(left.norm()) / (size or 1)


def _dense_weights(model: Any, dense: Any) -> Mapping[str, Tensor]:
    """Tensors of the dense model by the names of the quantized one."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if isinstance(dense, str | Path):
        if not isinstance(base, PreTrainedModel):
            raise ValueError(f"dense is {dense!r}: a {type(base).__name__} needs the model or its state dict")
        dense = type(base).from_pretrained(dense)
    if isinstance(dense, nn.Module):
        if any(isinstance(module, SVDQLinear) for module in dense.modules()):
            raise ValueError("dense is quantized itself: give the model as it was before")
        dense = dense.state_dict()
    prefix = f"{getattr(base, 'base_model_prefix', '')}."
    if not isinstance(dense, Mapping):
        raise ValueError(f"dense is {dense!r}: must be the dense model, its state dict, or its folder")
    return {**{f"{prefix}{name}": tensor for name, tensor in dense.items()}, **dense}
