"""Replace the linear layers of a model, and its fused experts, by quantized ones, and back: the only loop.

Three uses of it: empty layers on the meta device before a checkpoint is loaded (`quantizer`), layers
quantized in place (`convert_layers`), and the way back (`restore_layers`). Any `nn.Module` will do.
"""

from collections.abc import Collection, Container, Iterable, Mapping
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn
from transformers.utils import logging as hf_logging

from svdq_hf.calibration.inputs import InputStatistics
from svdq_hf.config import SVDQConfig
from svdq_hf.config.choices import COMPUTE
from svdq_hf.core.grid_values import require
from svdq_hf.nn.expert_layouts import layout_of
from svdq_hf.nn.experts import SVDQExperts, dense_experts
from svdq_hf.nn.inventory import svdq_experts, svdq_layers
from svdq_hf.nn.linear import SVDQLinear
from svdq_hf.quantize.budget import BudgetItem, spend
from svdq_hf.quantize.experts import check_experts, empty_experts, quantized_experts
from svdq_hf.quantize.layer import dense_layer, empty_layer, matrix_of, quantized_layer
from svdq_hf.quantize.layer_inputs import collect_for
from svdq_hf.quantize.selection import check_biases, dense_weight, layers_to_convert, shape_of
from svdq_hf.quantize.weight import check_weight

Item = TypeVar("Item")


def replace_layers(model: nn.Module, chosen: Mapping[str, nn.Module], config: SVDQConfig) -> None:
    """Replace the `chosen` layers, by name, by empty ones on the meta device."""
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
    """Quantize the layers of a model in place, one by one; each dense weight is let go at once.

    others: modules that will be quantized beside them, which a budget is to be spent on too.

    Returns:
        The config, its budget spent.

    Raises:
        ValueError: see `quantize_weight`, `layers_to_convert` and `collect_for`; layers done by then
            stay done.
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
    seen = collect_for(model, linear, config, batches)
    config = _spent({**linear, **(others or {})}, config, seen)
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
    """Refuse a k of a layer that is not there, or not quantized.

    Raises:
        ValueError: it names the layer.
    """
    for name in config.layer_k or {}:
        if name not in layers:
            raise ValueError(
                f"layer_k names {name!r}, which is no linear layer that is quantized here; take the names "
                "from footprint(model).layers or `svdq inspect`"
            )


def _spent(
    modules: Mapping[str, nn.Module], config: SVDQConfig, seen: Mapping[str, InputStatistics]
) -> SVDQConfig:
    items = {name: BudgetItem(*shape_of(one), partial(matrix_of, one)) for name, one in modules.items()}
    return spend(items, config, seen)


def restore_layers(model: nn.Module, dtype: torch.dtype) -> None:
    """Replace every SVDQLinear and SVDQExperts by the dense layer that it stands for, in `dtype`."""
    refuse_offloaded(model)
    trains = _trains(model)
    for name, experts in progress(dict(svdq_experts(model)).items(), "Dequantizing"):
        model.set_submodule(name, dense_experts(experts, dtype))
    for name, layer in progress(dict(svdq_layers(model)).items(), "Dequantizing"):
        model.set_submodule(name, dense_layer(layer, dtype, trains=trains))


def _trains(model: nn.Module) -> bool:
    """Whether layers that have no salient weights trained: as the others did."""
    values = [layer.salient_values for _, layer in svdq_layers(model)]
    flags = [value.requires_grad for value in values if value.numel() and isinstance(value, nn.Parameter)]
    others = (one for name, one in model.named_parameters() if "lora_" not in name)
    return any(flags) if flags else any(one.requires_grad for one in others)


def is_spread(model: nn.Module) -> bool:
    """Whether a device_map has put a model on more than one device."""
    return len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1


def refuse_offloaded(model: nn.Module) -> None:
    """Refuse to dequantize a model of which a layer is on disk.

    Raises:
        ValueError: it names the layer.
    """
    layers: list[tuple[str, SVDQLinear | SVDQExperts]] = [*svdq_layers(model), *svdq_experts(model)]
    for name, layer in layers:
        if any(part.is_meta for part in layer.parts().values()):
            raise ValueError(f"{name} is on disk; load the model without disk offload to dequantize it")


def set_compute(model: nn.Module, compute: str) -> nn.Module:
    """Let the quantized layers of a model compute "exact" or "fast" (see SVDQConfig); returns the model.

    Experts stay exact.

    Raises:
        ValueError: it is neither, or the model has no quantized layer.
    """
    require(compute in COMPUTE, "compute", compute, f"one of {COMPUTE}")
    layers = [layer for _, layer in svdq_layers(model)]
    if not layers and not any(svdq_experts(model)):
        raise ValueError(f"{type(model).__name__} has no layer that svdq_hf quantized")
    for layer in layers:
        layer.fast = compute == "fast"
    return model


def progress(items: Collection[Item], title: str) -> Iterable[Item]:
    """A progress bar that `transformers.utils.logging.disable_progress_bar` switches off; none of nothing."""
    if not items:
        return items
    return hf_logging.tqdm(items, desc=title)  # type: ignore[no-any-return]
