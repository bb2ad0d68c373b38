"""Conversion of a model in memory: linear layers and fused experts -> quantized ones, and back.

The only loop that replaces layers. Three uses: empty layers on the meta device before a checkpoint is loaded
(`replace_layers`), layers quantized in place (`convert_layers`), and the way back (`restore_layers`). Any
`nn.Module` will do. Not here: one layer (`quantize.layer`), and which ones are chosen (`quantize.selection`).
"""

from collections.abc import Collection, Container, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn
from transformers.utils import logging as hf_logging

from svdq_hf.config import SVDQConfig
from svdq_hf.config.choices import COMPUTE
from svdq_hf.config.layer_inputs import is_end
from svdq_hf.core.arguments import checked_arguments
from svdq_hf.core.grid_values import require
from svdq_hf.nn.expert_layouts import layout_of
from svdq_hf.nn.experts import SVDQExperts, dense_experts
from svdq_hf.nn.inventory import svdq_experts, svdq_layers
from svdq_hf.nn.linear import SVDQLinear
from svdq_hf.quantize.budget import items_of, spend
from svdq_hf.quantize.experts import check_experts, empty_experts, quantized_experts
from svdq_hf.quantize.input_statistics import collect_for
from svdq_hf.quantize.layer import dense_layer, empty_layer, quantized_layer
from svdq_hf.quantize.selection import check_biases, dense_weight, layers_to_convert, shape_of
from svdq_hf.quantize.weight import check_weight

Item = TypeVar("Item")


def replace_layers(model: nn.Module, chosen: Mapping[str, nn.Module], config: SVDQConfig) -> None:
    """Replace some layers by empty quantized ones on the meta device, before a checkpoint is loaded.

    Args:
        model: changed in place.
        chosen: the layers or fused experts to replace, by name.
        config: of the whole model.
    """
    for name, module in chosen.items():
        if layout_of(module) is not None:
            model.set_submodule(name, empty_experts(module, config))
        else:
            model.set_submodule(name, empty_layer(module, config.of_layer(name)))


def convert_layers(
    model: nn.Module,
    config: SVDQConfig,
    batches: Iterable[Any] | None = None,
    others: Mapping[str, nn.Module] | None = None,
) -> SVDQConfig:
    """Quantize the layers of a model in place, one by one; each dense weight is freed at once.

    Args:
        model: the dense model.
        config: how it is quantized.
        batches: calibration batches, where the config needs data.
        others: modules that the caller quantizes separately and that share the budget of `target_bits`.

    Returns:
        The config; where it has `target_bits`, with `layer_k` filled in.

    Raises:
        ValueError: see `quantize_weight`, `layers_to_convert` and `collect_for`; layers that are done by
            then stay quantized.
    """
    chosen = layers_to_convert(model, config)
    for name, module in {**chosen, **(others or {})}.items():  # before the first is changed
        check_biases(name, module)
    for name, module in chosen.items():
        if layout_of(module) is None:
            check_weight(name, dense_weight(module))
        else:
            check_experts(name, module)
    linear = {name: module for name, module in chosen.items() if layout_of(module) is None}
    check_layer_k([*linear, *(others or {})], config)
    check_layer_inputs(chosen, config)
    seen = collect_for(model, linear, config, batches, others)
    config = spend(items_of({**linear, **(others or {})}), config, seen)
    linear.clear()  # it would keep dense weights alive
    for name in progress(list(chosen), "Quantizing"):
        module = chosen.pop(name)
        layer: nn.Module
        if layout_of(module) is None:
            layer = quantized_layer(name, module, config, seen.pop(name, None))
        else:
            layer = quantized_experts(name, module, config)
        model.set_submodule(name, layer)
    return config


def check_layer_k(layers: Container[str], config: SVDQConfig) -> None:
    """Refuse a config whose `layer_k` names a layer that is not quantized.

    Args:
        layers: names of the layers that are.
        config: the config.

    Raises:
        ValueError: it names the layer.
    """
    for name in config.layer_k or {}:
        if name not in layers:
            raise ValueError(
                f"layer_k names {name!r}, which is no linear layer that is quantized here; take the names "
                "from footprint(model).layers or `svdq inspect`"
            )


def check_layer_inputs(layers: Mapping[str, nn.Module], config: SVDQConfig) -> None:
    """Refuse a config of which layers cannot do with their inputs what it says.

    Args:
        layers: the dense layers that are quantized, by name.
        config: the config.

    Raises:
        ValueError: a key of `layer_inputs` ends the name of no layer, or a layer has no such heads, subspace
            or Hadamard matrix; it names the one or the other.
    """
    if config.activations is None:
        return
    for end in config.layer_inputs or {}:
        if not any(is_end(end, name) for name in layers):
            raise ValueError(f"layer_inputs names {end!r}, which ends the name of no layer that is quantized")
    for name, module in layers.items():
        if layout_of(module) is not None:
            continue
        try:
            config.of_layer(name).scheme.columns(shape_of(module)[1])
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error


def restore_layers(model: nn.Module, dtype: torch.dtype) -> None:
    """Replace every SVDQLinear and SVDQExperts by the dense layer that it represents.

    Args:
        model: changed in place.
        dtype: of the dense weights.

    Raises:
        ValueError: see `refuse_offloaded`.
    """
    refuse_offloaded(model)
    trains = _trains(model)
    for name, experts in progress(dict(svdq_experts(model)).items(), "Dequantizing"):
        model.set_submodule(name, dense_experts(experts, dtype))
    for name, layer in progress(dict(svdq_layers(model)).items(), "Dequantizing"):
        model.set_submodule(name, dense_layer(layer, dtype, trains=trains))


def _trains(model: nn.Module) -> bool:
    """Whether restored layers without salient weights require a gradient: where the other parameters do."""
    values = [layer.salient_values for _, layer in svdq_layers(model)]
    flags = [value.requires_grad for value in values if value.numel() and isinstance(value, nn.Parameter)]
    others = (one for name, one in model.named_parameters() if "lora_" not in name)
    return any(flags) if flags else any(one.requires_grad for one in others)


def is_spread(model: nn.Module) -> bool:
    """Whether a device_map has placed a model on more than one device."""
    return len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1


def refuse_offloaded(model: nn.Module) -> None:
    """Refuse to dequantize a model of which a layer is on disk.

    Args:
        model: a quantized model.

    Raises:
        ValueError: it names the layer and the remedy.
    """
    layers: list[tuple[str, SVDQLinear | SVDQExperts]] = [*svdq_layers(model), *svdq_experts(model)]
    for name, layer in layers:
        if any(part.is_meta for part in layer.parts().values()):
            raise ValueError(f"{name} is on disk; load the model without disk offload to dequantize it")


@checked_arguments(model="load it first, e.g. AutoModel.from_pretrained(name)")
def set_compute(model: nn.Module, compute: str) -> nn.Module:
    """Choose whether the quantized layers of a model compute "exact" or "fast" (see SVDQConfig).

    Experts stay exact.

    Args:
        model: a quantized model; changed in place.
        compute: "exact" or "fast".

    Returns:
        The model.

    Raises:
        TypeError: an argument is of a wrong type (`WrongKind`, which is a ValueError as well).
        ValueError: `compute` is neither, or the model has no quantized layer.
    """
    require(compute in COMPUTE, "compute", compute, f"one of {COMPUTE}")
    layers = [layer for _, layer in svdq_layers(model)]
    if not layers and not any(svdq_experts(model)):
        raise ValueError(f"{type(model).__name__} has no layer that svdq_hf quantized")
    for layer in layers:
        layer.fast = compute == "fast"
    return model


def progress(items: Collection[Item], title: str) -> Iterable[Item]:
    """A progress bar over items that `transformers.utils.logging.disable_progress_bar` switches off.

    Args:
        items: what is iterated over; no bar is shown for an empty collection.
        title: in front of the bar.
    """
    if not items:
        return items
    return hf_logging.tqdm(items, desc=title)  # type: ignore[no-any-return]
