"""Quantization of a model in memory, in place, and the way back: what `from_pretrained` does, without files.

Not here: the loop over layers (`quantize.convert`).
"""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.base import _assign_is_quantized

from svdq_hf.config import SVDQConfig
from svdq_hf.config.choices import QUANT_METHOD
from svdq_hf.core.arguments import checked_arguments
from svdq_hf.integrations.peft.patches import has_adapters
from svdq_hf.integrations.transformers import patches
from svdq_hf.integrations.transformers.inference_mode import trainable_tensors
from svdq_hf.integrations.transformers.load import declare
from svdq_hf.integrations.transformers.quantizer import SVDQHfQuantizer
from svdq_hf.nn.inventory import name_packed_codes
from svdq_hf.quantize.convert import convert_layers, is_spread, restore_layers
from svdq_hf.quantize.embedding import chosen_embedding, quantize_embedding
from svdq_hf.quantize.head import chosen_head, quantize_head
from svdq_hf.quantize.integer_activations import prepare_activations

LOAD_FIRST = "load it first, e.g. AutoModel.from_pretrained(name)"
AS_CONFIG = "must be an SVDQConfig, such as SVDQConfig(k=256)"
AS_BATCHES = "must be a list of batches, each what the model takes; put a single one into a list: [batch]"


@checked_arguments(model=LOAD_FIRST, config=AS_CONFIG, batches=AS_BATCHES)
def quantize_model(
    model: nn.Module,
    config: SVDQConfig | dict[str, Any] | None = None,
    batches: Iterable[Any] | None = None,
) -> nn.Module:
    """Quantize a model that is in memory, in place.

    For a transformers model everything is set as `from_pretrained` sets it, so that
    `save_pretrained`, `dequantize` and `Trainer` work. Other modules only have their layers replaced.

    Args:
        model: a dense model.
        config: an SVDQConfig, or its choices as a dict; None: the defaults.
        batches: for error feedback, the scores that need data ("awq", "spqr", "pqi", "requant"), and better
            bases where activations are rounded: a few inputs of the model, each a mapping of keyword
            arguments, a tuple, or one tensor. Tokens hidden by a mask do not count.

    Returns:
        The model.

    Raises:
        TypeError: an argument is of a wrong type (`WrongKind`, which is a ValueError as well).
        ValueError: the model is quantized already, has no linear layer to quantize, or a weight has a NaN or
            an infinity; data is needed and missing, or synthetic batches cannot be made for the model;
            lm_head is True and there is no head that can be quantized.
    """
    with trainable_tensors():
        return _quantized(model, config, batches)


def _quantized(
    model: nn.Module, config: SVDQConfig | dict[str, Any] | None, batches: Iterable[Any] | None
) -> nn.Module:
    config = (
        SVDQConfig.from_dict(config) if isinstance(config, dict) else copy.deepcopy(config or SVDQConfig())
    )
    if has_adapters(model):
        raise ValueError(
            "the model has adapters, which would be quantized as its layers are: merge_and_unload() them "
            "first, or quantize the model without them and put them on that"
        )
    method = getattr(model, "quantization_method", None)
    if method is not None:
        by = getattr(method, "value", method)
        raise ValueError(f"the model is quantized already, by {by}: load the dense one to quantize it anew")
    if is_spread(model):
        raise ValueError(
            "the model is spread over devices by its device_map: load it without one to quantize it in "
            "memory, or with quantization_config, which quantizes it while loading"
        )
    head = chosen_head(model, config) if config.lm_head else None  # errors before anything is changed
    table = chosen_embedding(model, config, head)
    others = {one.name: one.module for one in (head, table) if one is not None}
    if config.activations is not None:
        _check_given(config, batches)
        batches = None if batches is None else list(batches)  # read twice
        config = prepare_activations(model, config, batches)
        batches = batches if config.data_needs else None
    config = convert_layers(model, config, batches, others)
    if head is not None:
        quantize_head(model, head, config)
    if table is not None:
        quantize_embedding(model, table, config)
    if isinstance(model, PreTrainedModel):
        _mark_quantized(model, SVDQHfQuantizer(config, pre_quantized=False))
    name_packed_codes(model)
    patches.apply()  # a part of a model: the whole may be saved
    return model


def _check_given(config: SVDQConfig, batches: Iterable[Any] | None) -> None:
    """Refuse what quantizing for integer activations would overwrite, or not read."""
    if config.layer_inputs is not None:
        raise ValueError(
            f"layer_inputs={config.layer_inputs}: is written by quantizing, from what the model is; leave it "
            "out, or config.replace(layer_inputs=None)"
        )
    if batches is not None and config.basis == "weights" and not config.data_needs:
        raise ValueError("basis='weights' needs no data: leave the batches out, or take basis='data'")


def _mark_quantized(model: PreTrainedModel, quantizer: SVDQHfQuantizer) -> None:
    """Set what `from_pretrained` sets of a quantized model."""
    model.hf_quantizer = quantizer
    model.is_quantized = True
    model.quantization_method = QUANT_METHOD
    quantizer.quantization_config = declare(model, quantizer.quantization_config)
    model.config.quantization_config = quantizer.quantization_config
    _assign_is_quantized(model)


@checked_arguments(model=LOAD_FIRST, dtype="such as torch.float32")
def dequantize_model(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Replace every quantized layer by the dense one that it represents, in place.

    Args:
        model: a quantized model.
        dtype: of the result; None: the model's own (FP32 for modules that are not transformers models).

    Returns:
        The model.

    Raises:
        TypeError: an argument is of a wrong type (`WrongKind`, which is a ValueError as well).
        ValueError: a layer is offloaded to disk.
    """
    for module in list(model.modules()):  # a PeftModel, for one, has the model inside
        if isinstance(module, PreTrainedModel) and isinstance(
            getattr(module, "hf_quantizer", None), SVDQHfQuantizer
        ):
            module.dequantize(dtype)
    restore_layers(model, dtype or torch.float32)
    return model
