"""The door to transformers: its hooks, answered. The only file that touches its internals.

Policy, not mechanism: which tensors a layer is loaded from, what is refused, what is said. The hooks
are those of transformers 5.20 to 5.23.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer, _assign_is_quantized

from svdq_hf.config import QUANT_METHOD, SVDQConfig
from svdq_hf.convert import (
    convert_layers,
    layers_to_convert,
    quantize_weight,
    replace_layers,
    restore_layers,
    svdq_layers,
)
from svdq_hf.decompose import check_parts
from svdq_hf.footprint import file_metadata, numbers, stored_facts
from svdq_hf.linear import SVDQLinear
from svdq_hf.saliency import data_needs, no_data


class SVDQHfQuantizer(HfQuantizer):  # type: ignore[misc]  # transformers ships no types
    """Loads, saves and dequantizes models whose linear layers are SVDQLinear."""

    quantization_config: SVDQConfig
    requires_calibration = False

    def __init__(self, quantization_config: SVDQConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.failures: list[str] = []
        """Layers that could not be quantized while loading; raised when loading ends."""

    # What transformers asks about the method.

    def is_serializable(self) -> bool:
        """Quantized models are saved as they are."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Gradients flow through quantized layers to adapters."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """The salient weights train with no adapter, and `Trainer` evaluates the model as it is."""
        return True

    @property
    def is_compileable(self) -> bool:
        """A quantized layer is one node of a graph."""
        return True

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse what cannot work, or would load silently wrong, before anything is loaded."""
        saliency = self.quantization_config.saliency
        if not self.pre_quantized and data_needs(saliency):
            raise no_data(saliency)
        device_map = kwargs.get("device_map")
        devices = device_map if isinstance(device_map, dict) else {}
        places = [name for name, device in devices.items() if device == "disk"]
        if places and not self.pre_quantized:
            raise ValueError(
                f"device_map puts {places} on disk, which cannot be quantized while loading: load and "
                "save_pretrained() the quantized model first, then load that with this device_map"
            )

    # Loading.

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        if getattr(model.config, "distributed_config", None) is not None:
            raise ValueError("tensor parallelism is not supported yet: load without tp_plan")
        chosen = layers_to_convert(model, self.quantization_config)
        facts = _facts(model, chosen, checkpoint_files or []) if self.pre_quantized else {}
        if facts:  # a layer that the file never had (a pooler, a new head) is a dense one to train
            chosen = {name: chosen[name] for name in facts}
        replace_layers(model, chosen, self.quantization_config)
        for name, layer in svdq_layers(model):
            layer.facts = numbers(facts.get(name, {}))
        if not self.pre_quantized:
            # Salient weights are kept from the checkpoint's precision: with dtype=bfloat16 the loader
            # would round an FP32 weight before it is quantized.
            strict = set(model._keep_in_fp32_modules_strict or ())
            model._keep_in_fp32_modules_strict = strict | {rf"^{re.escape(name)}\.weight$" for name in chosen}
        return model

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """Whether the tensor that the checkpoint has for `param_name` is still dense."""
        return not self.pre_quantized and _owner(model, param_name) is not None

    def get_quantize_ops(self) -> "SVDQQuantize":
        """The load-time conversion from a dense weight to stored parts."""
        return SVDQQuantize(self)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if self.failures:
            raise ValueError("could not quantize " + "; ".join(self.failures))
        for name, layer in svdq_layers(model):
            _check_loaded(name, layer, self.pre_quantized)
        return model

    # Saving and the way back.

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[None, dict[str, str]]:
        """The plain state dict, and what quantizing measured for the file's header."""
        return None, file_metadata(model)

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        # After save_pretrained, config.dtype is a string ("float32").
        target = getattr(torch, dtype) if isinstance(dtype, str) else dtype or model.dtype
        restore_layers(model, target)
        return model.to(target)


class SVDQQuantize(ConversionOps):  # type: ignore[misc]
    """One tensor of a checkpoint, `layer.weight`, becomes the stored parts of that layer."""

    def __init__(self, hf_quantizer: SVDQHfQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(
        self, input_dict: dict[str, Any], *, model: PreTrainedModel, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Quantize those of `input_dict` (full name -> tensor, or list of one) that need it.

        An error raised here would be reduced to a line in transformers' log, so it is kept, the rest
        is not quantized any more, and the quantizer raises it when loading ends.
        """
        converted: dict[str, Tensor] = {}
        for name in list(input_dict):
            value = input_dict.pop(name)  # let go of the dense weight as soon as it is quantized
            dense = value[0] if isinstance(value, list) else value
            layer = _owner(model, name)
            if layer is None:
                converted[name] = dense
            elif not self.hf_quantizer.failures:
                converted.update(self._quantize(name.removesuffix(".weight"), layer, dense))
        return converted

    def _quantize(self, name: str, layer: SVDQLinear, dense: Tensor) -> dict[str, Tensor]:
        weight = dense.T.contiguous() if layer.transposed else dense
        expected = (layer.out_features, layer.in_features)
        if tuple(weight.shape) != expected:
            self.hf_quantizer.failures.append(
                f"{name}: the checkpoint's weight is {list(dense.shape)}, the model's config says "
                f"{list(reversed(expected) if layer.transposed else expected)}"
            )
            return {}
        try:
            parts, layer.facts = quantize_weight(weight, self.hf_quantizer.quantization_config, name)
        except ValueError as error:
            self.hf_quantizer.failures.append(str(error))
            return {}
        return {f"{name}.{part}": tensor for part, tensor in parts.items()}


def quantize_model(
    model: nn.Module, config: SVDQConfig | None = None, batches: Iterable[Any] | None = None
) -> nn.Module:
    """Quantize a model that is in memory, in place; returns it.

    batches: for the scores that need data ("awq", "spqr"): what the model takes, a few of them, each
    a mapping of keyword arguments, a tuple, or one tensor. Tokens under a mask are left out.

    For a transformers model everything else is set as `from_pretrained` sets it, so that
    `save_pretrained`, `dequantize` and `Trainer` work. Other modules are converted and that is all.

    Raises:
        ValueError: the model is quantized already, has no linear layer to quantize, or a weight has
            a NaN or an infinity.
    """
    config = config or SVDQConfig()
    method = getattr(model, "quantization_method", None)
    if method is not None:
        raise ValueError(f"the model is quantized already, by {getattr(method, 'value', method)}")
    convert_layers(model, config, batches)
    if isinstance(model, PreTrainedModel):
        model.hf_quantizer = SVDQHfQuantizer(config, pre_quantized=False)
        model.is_quantized = True
        model.quantization_method = QUANT_METHOD
        model.config.quantization_config = config
        _assign_is_quantized(model)
    return model


def dequantize_model(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Replace every quantized layer by the dense one it stands for, in place; returns the model.

    dtype: of the result; None: that of the model.
    """
    if isinstance(model, PreTrainedModel) and getattr(model, "hf_quantizer", None) is not None:
        return model.dequantize(dtype)  # type: ignore[no-any-return]
    restore_layers(model, dtype or torch.float32)
    return model


def _owner(model: PreTrainedModel, param_name: str) -> SVDQLinear | None:
    """The quantized layer whose `weight` is `param_name`, if there is one."""
    path, _, leaf = param_name.rpartition(".")
    module = model.get_submodule(path) if leaf == "weight" else None
    return module if isinstance(module, SVDQLinear) else None


def _check_loaded(name: str, layer: SVDQLinear, pre_quantized: bool) -> None:
    """Refuse a layer that the checkpoint did not fill, or filled with nonsense."""
    parts = layer.parts()
    stored = {part: getattr(layer, part) for part in parts}
    if any(tensor.is_meta for tensor in stored.values()):
        return  # offloaded to disk: its tensors are read, one by one, when it runs
    missing = [part for part, tensor in stored.items() if not getattr(tensor, "_is_hf_initialized", False)]
    if len(missing) == len(parts) and not pre_quantized:
        raise ValueError(
            f"{name}: the checkpoint has no weights for this layer, and random ones cannot be trusted in "
            f"4 bits; load with modules_to_not_convert=[{name!r}] to keep it dense and train it"
        )
    try:
        if missing:
            raise ValueError(f"{', '.join(missing)} is missing")
        check_parts(parts, layer.in_features, layer.scheme)
    except ValueError as error:
        raise ValueError(
            f"{name}: {error}. The checkpoint is damaged or does not fit its config.json; quantize "
            "the original model again"
        ) from error


def _facts(
    model: PreTrainedModel, names: Iterable[str], files: Iterable[str | Path]
) -> dict[str, dict[str, Any]]:
    """What the files' headers say of those of the layers that they know.

    A model may have been saved with or without the prefix of its base model.
    """
    stored = stored_facts(file for file in files if str(file).endswith(".safetensors"))
    prefix = f"{model.base_model_prefix}."
    variants = {name: (name, name.removeprefix(prefix), prefix + name) for name in names}
    return {
        name: stored[variant]
        for name, spellings in variants.items()
        for variant in spellings
        if variant in stored
    }


if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:  # a reload of this module must not register twice
    register_quantizer(QUANT_METHOD)(SVDQHfQuantizer)
if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
    register_quantization_config(QUANT_METHOD)(SVDQConfig)
