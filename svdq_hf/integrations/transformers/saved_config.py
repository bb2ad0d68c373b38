"""The quantization_config that a model is saved with: it says what the model's layers are, whoever made them.

A model may have quantized parts and no config that says so (an encoder that was quantized by itself, a layer
that somebody put in), or the config of one and no quantized layer any more. `as_it_is` lets it be saved so
that it loads bit for bit, or refuses. Not here: how transformers is made to ask
(`integrations.transformers.patches`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from svdq_hf.config import SVDQConfig
from svdq_hf.config.choices import QUANT_METHOD, part_of_grid
from svdq_hf.core.grid import Grid
from svdq_hf.core.topk import salient_count
from svdq_hf.integrations.transformers.load import declare
from svdq_hf.nn.embedding import SVDQEmbedding, TiedEmbedding
from svdq_hf.nn.experts import SVDQExperts
from svdq_hf.nn.inventory import packed_weights, svdq_experts, svdq_layers
from svdq_hf.nn.linear import SVDQLinear
from svdq_hf.quantize.embedding import input_embedding

Layer = SVDQLinear | SVDQExperts


@contextmanager
def as_it_is(model: Any) -> Iterator[None]:
    """The model with the quantizer and the config of what it holds, for as long as it is saved.

    Args:
        model: a PreTrainedModel, quantized or not, as a whole or in part.

    Raises:
        ValueError: no config can say what it holds; the layer, or the part, is named.
    """
    quantizer, config = getattr(model, "hf_quantizer", None), model.config
    stored = getattr(config, "quantization_config", None)
    told = stored if quantizer is None else quantizer.quantization_config
    if getattr(model, "_hf_peft_config_loaded", False) or (told is not None and not _is_ours(told)):
        yield  # adapters alone are saved; or it is another method's model
        return
    quantized = any(packed_weights(model))
    if quantized and quantizer is not None:
        quantizer.quantization_config = config_of(model, quantizer.quantization_config)
        yield
        return
    own = ("hf_quantizer", "_weight_conversions", "model_tags")
    with _restored(model, *own), _restored(config, "quantization_config"):
        if quantized:
            _adopt(model)
        else:
            model.hf_quantizer = None
            config.__dict__.pop("quantization_config", None)
        yield


def _adopt(model: Any) -> None:
    """Give a model a quantizer for the parts of it that are quantized."""
    check_ends(model)
    config = config_of(model, _first_config(model)).replace(**_ends(model))
    model.hf_quantizer = AUTO_QUANTIZER_MAPPING[QUANT_METHOD](config, pre_quantized=False)
    model.hf_quantizer.quantization_config = declare(model, config)


def config_of(model: nn.Module, base: SVDQConfig) -> SVDQConfig:
    """The config that says how every quantized layer of a model is stored.

    Args:
        model: with quantized layers.
        base: what is not about how they are stored, and all of it where it says the same.

    Returns:
        `base`, or one of another grid, k, or layer_k (by the model's names).

    Raises:
        ValueError: two layers are stored in ways that no config can say together.
    """
    layers: dict[str, Layer] = {**dict(svdq_experts(model)), **dict(svdq_layers(model))}
    first = next(iter(layers))
    for name, layer in layers.items():
        _check_alike(first, layers[first], name, layer)
    experts = [layer for layer in layers.values() if isinstance(layer, SVDQExperts)]
    k = experts[0].scheme.k if experts else base.k
    held = {
        name: (salient_count(layer.scheme.k, *layer.shape), salient_count(k, *layer.shape))
        for name, layer in svdq_layers(model)
    }
    changed: dict[str, Any] = {} if k == base.k else {"k": k}
    if _stored(layers[first].scheme.grid) != _stored(base.scheme.grid):
        changed |= {name: getattr(layers[first].scheme.grid, name) for name in part_of_grid()}
    if base.layer_k is None and any(here != said for here, said in held.values()):
        changed["layer_k"] = {name: here for name, (here, _) in held.items()}
    return base.replace(**changed) if changed else base


def _check_alike(first: str, one: Layer, name: str, other: Layer) -> None:
    both_experts = isinstance(one, SVDQExperts) and isinstance(other, SVDQExperts)
    facts: list[tuple[str, Any, Any]] = [
        *zip(part_of_grid(), *(_stored(each.scheme.grid) for each in (one, other)), strict=True),
        ("compute_dtype", one.compute_dtype, other.compute_dtype),
        ("activations", _rounded_to(one), _rounded_to(other)),
        ("k of experts", one.scheme.k, other.scheme.k if both_experts else one.scheme.k),
    ]
    for what, here, there in facts:
        if here != there:
            raise ValueError(
                f"{first} has {what} {here} and {name} has {there}, and one config.json cannot say both: "
                "save the parts by themselves, each with save_pretrained; or quantize the dense model as a "
                f"whole, quantize_model(model, config); or make one dense, dequantize_model(part with {name})"
            )


def _rounded_to(layer: Layer) -> int | None:
    """Bits that a layer rounds its inputs to."""
    return layer.scheme.activations.bits if layer.scheme.activations else None


def _stored(grid: Grid) -> tuple[Any, ...]:
    """What of a grid is seen in the stored parts: not how its scales were fitted."""
    plain = replace(grid, scale="mse", clip_sigma=2.5)
    return tuple(getattr(plain, name) for name in part_of_grid())


def check_ends(model: nn.Module) -> None:
    """Refuse a packed embedding that would not be found again, as one of a part.

    Raises:
        ValueError: it is named.
    """
    table = input_embedding(model)
    for name, module in model.named_modules():
        if isinstance(module, TiedEmbedding) and module.head not in (table, _head(model)):
            what = "reads its rows from a packed matrix that is not this model's own output head or embedding"
        elif isinstance(module, SVDQEmbedding) and module is not table:
            what = "is a packed embedding, and not what this model's get_input_embeddings() answers"
        else:
            continue
        raise ValueError(
            f"{type(model).__name__}.save_pretrained: {name} {what}, so that it could not be loaded; save "
            "the model that was quantized, by itself, or quantize a part without lm_head and embeddings"
        )


def _ends(model: nn.Module) -> dict[str, bool]:
    packed_table = isinstance(input_embedding(model), SVDQEmbedding)
    return {"lm_head": isinstance(_head(model), SVDQLinear), "embeddings": packed_table}


def _head(model: nn.Module) -> nn.Module | None:
    head: nn.Module | None = getattr(model, "get_output_embeddings", lambda: None)()
    return head


def _first_config(model: nn.Module) -> SVDQConfig:
    """That of the first part that was quantized by itself; the defaults where modules were, or layers."""
    for module in model.modules():
        config = getattr(getattr(module, "hf_quantizer", None), "quantization_config", None)
        if isinstance(config, SVDQConfig):
            return config.replace(layer_k=None, target_bits=None)
    layers: list[Layer] = [*dict(svdq_layers(model)).values(), *dict(svdq_experts(model)).values()]
    first = layers[0]
    return SVDQConfig(k=first.scheme.k, compute_dtype=first.compute_dtype)


def _is_ours(config: Any) -> bool:
    method = config.get("quant_method") if isinstance(config, dict) else getattr(config, "quant_method", "")
    return bool(method == QUANT_METHOD)


@contextmanager
def _restored(owner: Any, *names: str) -> Iterator[None]:
    """Attributes of an object are afterwards what they were, or not there."""
    before = {name: owner.__dict__[name] for name in names if name in owner.__dict__}
    try:
        yield
    finally:
        for name in names:
            owner.__dict__.pop(name, None)
        owner.__dict__.update(before)
