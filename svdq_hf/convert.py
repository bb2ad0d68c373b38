"""Pick the linear layers of a model, and its fused experts, and replace them: the only such loop.

Three uses of it: empty layers on the meta device before a checkpoint is loaded (`quantizer`), layers
quantized in place (`convert_layers`), and the way back (`restore_layers`). Any `nn.Module` will do.
"""

import logging
import re
from collections.abc import Container, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils import logging as hf_logging

from svdq_hf.budget import Layer, spend
from svdq_hf.calibration import InputStatistics, collect_inputs
from svdq_hf.config import COMPUTE, SVDQConfig
from svdq_hf.embedding import SVDQTable
from svdq_hf.experts import SVDQExperts, dense_experts, layout_of, stacks_of, svdq_experts
from svdq_hf.linear import SVDQLinear
from svdq_hf.model_code import is_linear, layers_read
from svdq_hf.names import Stored
from svdq_hf.stacks import check_choices, check_experts, empty_experts, quantized_experts, warn_of_unknown
from svdq_hf.synthetic import synthetic_batches
from svdq_hf.weight import check_weight, quantize_weight

Item = TypeVar("Item")
logger = logging.getLogger(__name__)

FEWEST_ROWS = 8
"""Layers with fewer rows are gates or tiny heads: nothing to win, much to lose."""


def collect_for(
    model: nn.Module, layers: Mapping[str, nn.Module], config: SVDQConfig, batches: Iterable[Any] | None
) -> dict[str, InputStatistics]:
    """The statistics that `config` needs of `layers`; empty where it needs no data.

    Raises:
        ValueError: data is needed and `batches` is None, or the opposite; see also `collect_inputs` and
            `synthetic_batches`.
    """
    needs = config.data_needs
    if config.synthetic:
        if batches is not None:
            raise ValueError("error_feedback 'synthetic' makes its batches: leave yours out, or say True")
        batches = synthetic_batches(model, seed=config.seed)
        model = getattr(model, "base_model", model)  # heads stay dense: their outputs are not needed
    if not needs and batches is not None:
        raise ValueError(f"saliency {config.saliency!r} needs no data: leave the batches out")
    if not needs:
        return {}
    if batches is None:
        raise config.no_data()
    return collect_inputs(model, layers, batches, gram="input_gram" in needs)


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """All layers of a kind that can be quantized, fused experts among them, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if is_linear(module) or layout_of(module) is not None
    }


def weights_of(name: str, module: nn.Module) -> list[Stored]:
    """The weights of a dense layer that are quantized, under the names they are stored by."""
    return stacks_of(name, module) or [Stored(name, shape_of(module))]


def layers_to_convert(model: nn.Module, config: SVDQConfig) -> dict[str, nn.Module]:
    """The linear layers of `model` that `config` quantizes, by name.

    Raises:
        ValueError: there are none, or the model is quantized already.
    """
    modules = dict(model.named_modules())
    if any(isinstance(module, SVDQLinear | SVDQExperts) for module in modules.values()):
        raise ValueError("the model is quantized already, by svdq; call dequantize_model(model) first")
    if modules.keys() == {""}:
        raise ValueError(f"{type(model).__name__} is a single layer; put it into an nn.Sequential")
    asked = kept_dense(config)
    skips = default_skips(model)
    linear = linear_layers(model)
    chosen = {
        name: module
        for name, module in linear.items()
        if all(should_convert_module(one, asked) for one in all_names({name: module}))
        and not any(_within(one, skips) for one in all_names({name: module}))
        # Experts are one thing: both matrices of theirs are quantized, or none.
        and all(stored.shape[-2] >= FEWEST_ROWS for stored in weights_of(name, module))
    }
    for pattern in unmatched(all_names(linear), config):
        logger.warning("modules_to_not_convert: %r matches no linear layer of this model", pattern)
    if not chosen:
        rest = [module for name, module in modules.items() if name not in linear]
        others = sorted({type(module).__name__ for module in rest if isinstance(module, nn.Linear)})
        raise ValueError(
            f"{type(model).__name__} has no linear layer to quantize "
            f"({len(linear)} in all, kept dense by {sorted({*skips, *asked})}"
            f"{'; of kinds of their own: ' + ', '.join(others) if others else ''})"
        )
    warn_of_unknown(modules)
    check_choices(chosen, config)
    return chosen


def all_names(layers: Mapping[str, nn.Module]) -> list[str]:
    """The names of dense layers, and of the matrices of those that are fused experts."""
    return [*layers, *(stored.name for name, module in layers.items() for stored in stacks_of(name, module))]


def unmatched(names: Iterable[str], config: SVDQConfig) -> list[str]:
    """The user's patterns of modules to keep dense that match none of the `names` of linear layers.

    >>> unmatched(["mlp.up", "mlp.down"], SVDQConfig(modules_to_not_convert=["down", "pooler"]))
    ['pooler']
    """
    names = list(names)
    return [
        pattern
        for pattern in kept_dense(config)
        if all(should_convert_module(name, [pattern]) for name in names)
    ]


def kept_dense(config: SVDQConfig) -> list[str]:
    """The user's names of modules, each a regular expression that compiles."""
    patterns = list(config.modules_to_not_convert or [])
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"modules_to_not_convert: {pattern!r} is no regular expression: {error}"
            ) from error
    return patterns


def _within(name: str, modules: Iterable[str]) -> bool:
    """Whether a module is one of `modules`, or inside one; `proj` is not `q_proj`."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def default_skips(model: nn.Module) -> list[str]:
    """Names of modules that stay dense when a model is quantized (a file says itself what it holds).

    Everything outside the base model (heads), the output embeddings, tied weights, what the model
    itself keeps in FP32, and layers of which other code reads the weight: torch's own transformer
    layers, and what `layers_read` finds.
    """
    skips = _shared_weights(model) + layers_read(model)
    fused = (nn.TransformerEncoderLayer, nn.MultiheadAttention)
    skips += [name for name, module in model.named_modules() if isinstance(module, fused)]
    base = getattr(model, "base_model", model)
    if base is not model:
        skips += [name for name, child in model.named_children() if child is not base]
    embeddings = getattr(model, "get_output_embeddings", None)
    output = embeddings() if callable(embeddings) else None
    skips += [name for name, module in model.named_modules() if output is not None and module is output]
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    ties = {*tied.keys(), *tied.values()}
    skips += [name.removesuffix(".weight") for name in ties if name.endswith(".weight")]
    for attribute in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
        for key in getattr(model, attribute, None) or []:  # of a module, or of its weight
            within = re.compile(rf"(^|\.){key}($|\.)")
            skips += [name for name in linear_layers(model) if within.search(f"{name}.weight")]
    return sorted(set(skips))


def _shared_weights(model: nn.Module) -> list[str]:
    """Modules whose weight is also another's."""
    users: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name.endswith(".weight"):
            users.setdefault(id(parameter), []).append(name.removesuffix(".weight"))
    return [name for names in users.values() if len(names) > 1 for name in names]


def empty_layer(module: nn.Module, config: SVDQConfig, device: str = "meta") -> SVDQLinear:
    """An SVDQLinear of the shape of a dense layer, with nothing in it yet."""
    out, in_features = shape_of(module)
    layer = SVDQLinear(
        in_features,
        out,
        config.scheme,
        bias=module.bias is not None,
        dtype=_weight(module).dtype,
        device=device,
        compute_dtype=config.torch_compute_dtype,
        fast=config.compute == "fast",
        transposed=isinstance(module, Conv1D),
    )
    return layer.train(module.training)


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
    for name, module in chosen.items():  # before the first is changed
        if layout_of(module) is None:
            check_weight(name, _weight(module))
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
    def to_spend_on(module: nn.Module) -> Layer:
        transposed = isinstance(module, Conv1D)
        return Layer(*shape_of(module), lambda: _weight(module).T if transposed else _weight(module))

    return spend({name: to_spend_on(module) for name, module in modules.items()}, config, seen)


def restore_layers(model: nn.Module, dtype: torch.dtype) -> None:
    """Replace every SVDQLinear and SVDQExperts by the dense layer that it stands for, in `dtype`."""
    check_here(model)
    for name, experts in progress(dict(svdq_experts(model)).items(), "Dequantizing"):
        model.set_submodule(name, dense_experts(experts, dtype))
    for name, layer in progress(dict(svdq_layers(model)).items(), "Dequantizing"):
        model.set_submodule(name, dense_layer(layer, dtype))


def quantized_layer(
    name: str, module: nn.Module, config: SVDQConfig, inputs: InputStatistics | None = None
) -> SVDQLinear:
    """The quantized layer of a dense one; it trains what that trains.

    Raises:
        ValueError: see `quantize_weight`.
    """
    weight, layer = _weight(module), empty_layer(module, config.of_layer(name))
    parts, layer.facts = quantize_weight(weight.T if layer.transposed else weight, config, name, inputs)
    layer.load_parts(parts)
    layer.bias = module.bias  # type: ignore[assignment]
    trains = _weight(module, detach=False).requires_grad and layer.salient_values.numel() > 0
    layer.salient_values.requires_grad_(trains)
    return layer


def check_here(model: nn.Module) -> None:
    """Refuse to dequantize a model of which a layer is on disk.

    Raises:
        ValueError: it names the layer.
    """
    layers: list[tuple[str, SVDQLinear | SVDQExperts]] = [*svdq_layers(model), *svdq_experts(model)]
    for name, layer in layers:
        if any(part.is_meta for part in layer.parts().values()):
            raise ValueError(f"{name} is on disk; load the model without disk offload to dequantize it")


def dense_layer(layer: SVDQLinear, dtype: torch.dtype) -> nn.Module:
    """The `nn.Linear` (or `Conv1D`, or embedding) that an SVDQLinear stands for."""
    if isinstance(layer, SVDQTable):
        return layer.restored(nn.Parameter(layer.dequantize().to(dtype)))
    out, in_features = layer.out_features, layer.in_features
    with torch.device("meta"):
        dense: nn.Module
        if layer.transposed:
            dense = Conv1D(out, in_features)
        else:
            dense = nn.Linear(in_features, out, bias=layer.bias is not None)
    weight = layer.dequantize().to(dtype)
    dense.weight = nn.Parameter(weight.T.contiguous() if layer.transposed else weight)
    if layer.bias is not None:
        dense.bias = nn.Parameter(layer.bias.detach().to(dtype))
    return dense.train(layer.training)


def svdq_layers(model: nn.Module) -> Iterator[tuple[str, SVDQLinear]]:
    """The quantized layers of a model, with their names."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, SVDQLinear))


def set_compute(model: nn.Module, compute: str) -> nn.Module:
    """Let the quantized layers of a model compute "exact" or "fast" (see SVDQConfig); returns the model.

    Experts stay exact.

    Raises:
        ValueError: it is neither, or the model has no quantized layer.
    """
    if compute not in COMPUTE:
        raise ValueError(f"compute={compute!r}: must be one of {COMPUTE}")
    layers = [layer for _, layer in svdq_layers(model)]
    if not layers and not any(svdq_experts(model)):
        raise ValueError(f"{type(model).__name__} has no layer that svdq_hf quantized")
    for layer in layers:
        layer.fast = compute == "fast"
    return model


def progress(items: Iterable[Item], title: str) -> Iterable[Item]:
    """A progress bar that `transformers.utils.logging.disable_progress_bar` switches off."""
    return hf_logging.tqdm(items, desc=title)  # type: ignore[no-any-return]


def _weight(module: nn.Module, *, detach: bool = True) -> Tensor:
    """The weight of a dense layer, as it stores it."""
    if not isinstance(module.weight, Tensor):
        raise TypeError(f"{type(module).__name__} has no weight")
    return module.weight.detach() if detach else module.weight


def shape_of(module: nn.Module) -> tuple[int, int]:
    """(out, in) of a dense layer."""
    shape = _weight(module).shape
    return (shape[1], shape[0]) if isinstance(module, Conv1D) else (shape[0], shape[1])
