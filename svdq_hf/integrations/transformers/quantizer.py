"""SVDQHfQuantizer: the HfQuantizer that transformers calls while loading, saving and dequantizing a model.

Each method implements one hook of `transformers.quantizers.base.HfQuantizer` (5.20 to 5.24). Not here: what
loading does (`integrations.transformers.load_packed`, `integrations.transformers.load_dense`).
"""

import copy
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.quantizers.base import HfQuantizer

from svdq_hf.config import SVDQConfig
from svdq_hf.format.metadata import layers_metadata, tags
from svdq_hf.integrations.transformers import patches
from svdq_hf.integrations.transformers.file_names import (
    config_in_files,
    file_names,
    restore_names,
)
from svdq_hf.integrations.transformers.load import Load
from svdq_hf.integrations.transformers.load_dense import DenseLoad
from svdq_hf.integrations.transformers.load_packed import PackedLoad
from svdq_hf.integrations.transformers.quantize_op import SVDQQuantize
from svdq_hf.nn.inventory import layer_facts, name_packed_codes, packed_weights, svdq_layers
from svdq_hf.quantize.convert import refuse_offloaded, restore_layers
from svdq_hf.quantize.head import restore_head


class SVDQHfQuantizer(HfQuantizer):  # type: ignore[misc]  # transformers ships no types
    """Loads, saves and dequantizes models whose linear layers are SVDQLinear, and experts SVDQExperts."""

    quantization_config: SVDQConfig
    requires_calibration = False

    def __init__(self, quantization_config: SVDQConfig, **kwargs: Any) -> None:
        super().__init__(copy.deepcopy(quantization_config), **kwargs)  # the caller may change its own
        self.kind: type[PackedLoad | DenseLoad] = PackedLoad if self.pre_quantized else DenseLoad
        self.load: Load | None = None
        """The load in progress; None between loads."""
        patches.apply()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        patches.apply()  # a pickled model may be all that this process sees of us

    # Properties of the method.

    def is_serializable(self) -> bool:
        """True: quantized models are saved as they are."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether gradients flow through quantized layers to adapters; not where activations are rounded."""
        return self.quantization_config.activations is None

    @property
    def is_qat_trainable(self) -> bool:
        """Whether the salient weights train without adapters; `Trainer` evaluates the model as it is."""
        return self.quantization_config.activations is None

    @property
    def is_compileable(self) -> bool:
        """True: a quantized layer is one node of a graph."""
        return True

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse, before anything is loaded, arguments that cannot work or would silently load a wrong model.

        Raises:
            ValueError: see `DenseLoad.check_environment`.
        """
        self.kind.check_environment(self.quantization_config, kwargs.get("device_map"))

    # Loading.

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        _refuse_sharded(model)
        self.load = self.kind(self.quantization_config, checkpoint_files or [])
        self.load.prepare(model)
        return model

    def update_weight_conversions(self, weight_conversions: list[Any], *model: PreTrainedModel) -> list[Any]:
        """The family's conversions of tensors, adapted to packed weights.

        Args:
            weight_conversions: of the family.
            *model: the model, which transformers passes since 5.21.
        """
        conversions = super().update_weight_conversions(weight_conversions, *model)
        return conversions if self.load is None else self.load.conversions(conversions)

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """Whether a tensor of the checkpoint is dense and to be quantized.

        Args:
            model: the model.
            param_name: name of the tensor in the model.
            **kwargs: further arguments that transformers passes.
        """
        return self.load is not None and self.load.wants(model, param_name)

    def get_quantize_ops(self) -> SVDQQuantize:
        """The load-time conversion from a dense weight to stored parts.

        Raises:
            ValueError: no model is being loaded.
        """
        if self.load is None:
            raise ValueError("weights are quantized only while a model is loaded, by from_pretrained")
        return self.load.operation()

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        load, self.load = self.load, None
        if load is not None:
            self.quantization_config = model.config.quantization_config = load.finish(model)
            name_packed_codes(model)
        return model

    # Saving and the way back.

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[None, dict[str, str]]:
        """None (the plain state dict is saved), and metadata for the file's header: the measured facts.

        Raises:
            ValueError: the model is sharded by FSDP, or has quantized layers inside a PeftModel's wrappers.
        """
        if any(hasattr(parameter, "full_tensor") for parameter in model.parameters()):
            raise ValueError(
                "the model is sharded by FSDP: gather it on all ranks, get_model_state_dict(model, "
                "options=StateDictOptions(full_state_dict=True)), load_state_dict() that into the model as "
                "it was loaded, and save_pretrained() this one"
            )
        within = next((name for name, _ in svdq_layers(model) if ".base_layer" in name), None)
        if within is not None and not model._hf_peft_config_loaded:  # else it is the adapters that are saved
            raise ValueError(
                f"{within} is inside of a LoRA layer, and saved so could not be loaded: unload() the "
                "PeftModel and save what it returns, or save the PeftModel itself, which saves the adapter"
            )
        self.quantization_config = config_in_files(model, self.quantization_config)
        model.config.quantization_config = self.quantization_config  # config.json is written after this
        return None, layers_metadata(layer_facts(model, file_names(model)))

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        # After save_pretrained, config.dtype is a string ("float32").
        target = getattr(torch, dtype) if isinstance(dtype, str) else dtype or model.dtype
        refuse_offloaded(model)
        weights = [packed.stored for packed in packed_weights(model)]
        restore_head(model, target)
        restore_layers(model, target)
        ours = tags(self.quantization_config.bits)
        model.model_tags = [tag for tag in model.model_tags or [] if tag not in ours]
        restore_names(model, weights)
        return model if target == model.dtype else model.to(target)  # what a family keeps in FP32 stays


def _refuse_sharded(model: PreTrainedModel) -> None:
    if getattr(model.config, "distributed_config", None) is not None:
        raise ValueError(
            "a quantized model is not sharded while it loads (distributed_config, tp_plan): a slice of a "
            "matrix has as many salient weights as fall into it. Load it whole; fully_shard(model) of "
            "FSDP2 and DistributedDataParallel wrap it as it is"
        )
