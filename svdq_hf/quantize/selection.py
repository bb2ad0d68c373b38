"""Selection of the layers that are quantized: candidates, and the defaults and names that keep some dense.

Not here: how a model's own code uses its layers (`quantize.code_inspection`), what a name means
(`quantize.kept_dense`), and replacing layers (`quantize.convert`).
"""

import logging
import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from svdq_hf.config import SVDQConfig
from svdq_hf.format.names import WeightName
from svdq_hf.nn.expert_layouts import layout_of, stacks_of
from svdq_hf.nn.experts import SVDQExperts
from svdq_hf.nn.linear import SVDQLinear
from svdq_hf.quantize.code_inspection import is_linear, layers_read
from svdq_hf.quantize.experts import check_expert_choices, warn_of_unknown
from svdq_hf.quantize.kept_dense import KeptDense

logger = logging.getLogger(__name__)

FEWEST_ROWS = 8
"""Layers with fewer rows are gates or tiny heads: quantizing saves little there and costs much."""


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """All layers of a kind that can be quantized, fused experts among them, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if is_linear(module) or layout_of(module) is not None
    }


def weights_of(name: str, module: nn.Module) -> list[WeightName]:
    """The weights of a dense layer that are quantized, with the names they are stored under.

    Args:
        name: of the layer.
        module: the layer, or fused experts.
    """
    return stacks_of(name, module) or [WeightName(name, shape_of(module))]


def layers_to_convert(model: nn.Module, config: SVDQConfig) -> dict[str, nn.Module]:
    """The layers of a model that a config quantizes.

    Args:
        model: the dense model.
        config: how it is quantized.

    Returns:
        Linear layers and fused experts, by name.

    Raises:
        ValueError: there are none, or the model is quantized already.
    """
    modules = dict(model.named_modules())
    if any(isinstance(module, SVDQLinear | SVDQExperts) for module in modules.values()):
        raise ValueError(
            "the model is quantized already, by svdq; take the dense model, or make it dense again with "
            "dequantize_model(model), on the command line with `svdq export`"
        )
    if modules.keys() == {""}:
        raise ValueError(f"{type(model).__name__} is a single layer; put it into an nn.Sequential")
    linear = linear_layers(model)
    chosen = convertible(model, linear, KeptDense.of(config))
    for pattern, kept in kept_by_name(all_names(linear), config).items():
        if kept:
            logger.info("modules_to_not_convert: %r keeps %d dense: %s", pattern, len(kept), ", ".join(kept))
        else:
            logger.warning("modules_to_not_convert: %r matches no linear layer of this model", pattern)
    if not chosen:
        asked = config.modules_to_not_convert or []
        rest = [module for name, module in modules.items() if name not in linear]
        others = sorted({type(module).__name__ for module in rest if isinstance(module, nn.Linear)})
        raise ValueError(
            f"{type(model).__name__} has no linear layer to quantize "
            f"({len(linear)} in all, kept dense by {sorted({*default_skips(model), *asked})}"
            f"{'; of kinds of their own: ' + ', '.join(others) if others else ''})"
        )
    warn_of_unknown(modules)
    check_expert_choices(chosen, config)
    return chosen


def all_names(layers: Mapping[str, nn.Module]) -> list[str]:
    """The names of dense layers, and of the matrices of those that are fused experts."""
    return [*layers, *(stored.name for name, module in layers.items() for stored in stacks_of(name, module))]


def convertible(model: nn.Module, linear: Mapping[str, nn.Module], asked: KeptDense) -> dict[str, nn.Module]:
    """The candidates that neither the user nor a default keeps dense.

    Args:
        model: the dense model.
        linear: its candidates, by name.
        asked: the user's names of modules to keep dense.
    """
    skips = default_skips(model)
    return {
        name: module
        for name, module in linear.items()
        if not any(asked.keeps(one) or _within(one, skips) for one in all_names({name: module}))
        # Experts are one thing: both matrices of theirs are quantized, or none.
        and all(stored.shape[-2] >= FEWEST_ROWS for stored in weights_of(name, module))
    }


def kept_by_name(names: Iterable[str], config: SVDQConfig) -> dict[str, list[str]]:
    """The layers that each name in `modules_to_not_convert` keeps dense.

    Args:
        names: of layers.
        config: has the user's names.

    >>> kept_by_name(["mlp.up", "mlp.down"], SVDQConfig(modules_to_not_convert=["down", "pooler"]))
    {'down': ['mlp.down'], 'pooler': []}
    """
    asked = KeptDense.of(config)
    kept: dict[str, list[str]] = {name: [] for name in asked.all}
    for layer in names:
        for name in asked.names(layer):
            kept[name].append(layer)
    return kept


def unmatched(names: Iterable[str], config: SVDQConfig) -> list[str]:
    """The user's names of modules to keep dense that match no layer.

    Args:
        names: of layers.
        config: has the user's names.

    >>> unmatched(["mlp.up", "mlp.down"], SVDQConfig(modules_to_not_convert=["down", "pooler"]))
    ['pooler']
    """
    return [name for name, kept in kept_by_name(names, config).items() if not kept]


def _within(name: str, modules: Iterable[str]) -> bool:
    """Whether a module is one of `modules`, or inside one; `proj` is not `q_proj`."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def default_skips(model: nn.Module) -> list[str]:
    """Names of modules that stay dense by default when a model is quantized.

    Everything outside the base model (heads), the output embeddings, tied weights, what the model
    itself keeps in FP32, and layers of which other code reads the weight: torch's own transformer
    layers, and what `layers_read` finds. (For a quantized file it is the file that says what is quantized.)
    """
    skips = _shared_weights(model) + layers_read(model)
    fused = (nn.TransformerEncoderLayer, nn.MultiheadAttention)
    skips += [name for name, module in model.named_modules() if isinstance(module, fused)]
    skips += heads(model)
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


_HEADS = ("classifier", "score", "qa_outputs", "ctc_head")
"""Names of heads in transformers models that are their own base model (CLIP's, Siglip's, T5's)."""


def heads(model: nn.Module) -> list[str]:
    """Names of the modules outside the base model.

    A transformers model that is its own base model has none outside; there, names that heads have count.
    """
    base = getattr(model, "base_model", model)
    if base is not model:
        return [name for name, child in model.named_children() if child is not base]
    ours = isinstance(model, PreTrainedModel)
    return [name for name, _ in model.named_children() if ours and name in _HEADS]


def _shared_weights(model: nn.Module) -> list[str]:
    """Modules that share their weight with another one."""
    users: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name.endswith(".weight"):
            users.setdefault(id(parameter), []).append(name.removesuffix(".weight"))
    return [name for names in users.values() if len(names) > 1 for name in names]


def check_biases(name: str, module: nn.Module) -> None:
    """Refuse a layer, or experts, with a bias that is not finite.

    Args:
        name: of the layer, for errors.
        module: the layer.

    Raises:
        ValueError: a NaN or an infinity; it names the layer.
    """
    for own, bias in module.named_parameters(recurse=False):
        if own.endswith("bias") and not bias.is_meta and not torch.isfinite(bias).all():
            raise ValueError(f"{name}: {own} has a NaN or an infinity: the checkpoint is damaged")


def dense_weight(module: nn.Module, *, detach: bool = True) -> Tensor:
    """The weight of a dense layer as the layer stores it, `[out, in]`, or `[in, out]` in a `Conv1D`.

    Args:
        module: the layer.
        detach: whether the result is detached from the graph.

    Raises:
        TypeError: the module has no weight.
    """
    if not isinstance(module.weight, Tensor):
        raise TypeError(f"{type(module).__name__} has no weight")
    return module.weight.detach() if detach else module.weight


def shape_of(module: nn.Module) -> tuple[int, int]:
    """(out, in) of a dense layer."""
    shape = dense_weight(module).shape
    return (shape[1], shape[0]) if isinstance(module, Conv1D) else (shape[0], shape[1])
