"""The door to transformers: its hooks, answered.

Policy, not mechanism: which tensors a layer is loaded from, what is refused, what is said. The hooks
are those of transformers 5.20 to 5.24.
"""

import copy
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.base import HfQuantizer

from svdq_hf.config import SVDQConfig
from svdq_hf.format.metadata import layers_metadata, numbers, tags
from svdq_hf.format.names import WeightName
from svdq_hf.integrations.transformers import patches
from svdq_hf.integrations.transformers.checkpoint_headers import (
    REMEDY,
    Checkpoint,
    check_dense,
    check_source,
    read_checkpoint,
    stored_layers,
    stored_weights,
)
from svdq_hf.integrations.transformers.expert_conversions import without_stacking
from svdq_hf.integrations.transformers.file_names import (
    file_names,
    keep_own_names,
    layer_k_by_model_name,
    restore_names,
    unconverted,
    write_layer_k_by_file_name,
)
from svdq_hf.integrations.transformers.load_checks import check_loaded, loaded_exactly
from svdq_hf.integrations.transformers.quantize_op import SVDQQuantize, module_of
from svdq_hf.integrations.transformers.stored_ends import config_key_by_module, stored_embedding, stored_head
from svdq_hf.nn.embedding import SVDQEmbedding, TiedEmbedding
from svdq_hf.nn.expert_layouts import layout_of
from svdq_hf.nn.inventory import layer_facts, packed_weights, svdq_experts, svdq_layers
from svdq_hf.quantize.budget import spend
from svdq_hf.quantize.convert import (
    check_layer_k,
    empty_layer,
    is_spread,
    refuse_offloaded,
    replace_layers,
    restore_layers,
)
from svdq_hf.quantize.embedding import (
    Embedding,
    chosen_embedding,
    input_table,
    put_empty_embedding,
    quantize_embedding,
)
from svdq_hf.quantize.head import (
    Head,
    chosen_head,
    dense_names,
    find_head,
    put_head,
    quantize_head,
    restore_head,
)
from svdq_hf.quantize.selection import layers_to_convert, linear_layers, weights_of


class SVDQHfQuantizer(HfQuantizer):  # type: ignore[misc]  # transformers ships no types
    """Loads, saves and dequantizes models whose linear layers are SVDQLinear, and experts SVDQExperts."""

    quantization_config: SVDQConfig
    requires_calibration = False

    def __init__(self, quantization_config: SVDQConfig, **kwargs: Any) -> None:
        super().__init__(copy.deepcopy(quantization_config), **kwargs)  # not the caller's to change
        self.failures: list[ValueError] = []
        """Of layers that could not be quantized while loading; raised when loading ends."""
        self.config = self.quantization_config
        """With `layer_k` by the model's names, while it loads."""
        self.strict: Any = None
        """The model's own list of what stays in FP32, which loading adds to for a while."""
        self.partners: set[str] = set()
        """Tensors that come out of one tensor of a file together with a weight to quantize."""
        self.packed: list[WeightName] = []
        """The packed weights of the model that is being loaded."""

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
        if not self.pre_quantized and self.quantization_config.data_needs:
            raise self.quantization_config.no_data()
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
        _refuse_sharded(model)
        layers = linear_layers(model) | input_table(model, self.quantization_config)
        known = [stored for name, layer in layers.items() for stored in weights_of(name, layer)]
        checkpoint = read_checkpoint(model, known, checkpoint_files or [])
        self.config = layer_k_by_model_name(checkpoint, self.quantization_config)
        chosen = self._chosen(model, checkpoint, layers)
        if self.pre_quantized:
            head = stored_head(model, checkpoint, self.config)
            table = stored_embedding(model, checkpoint, self.config, head)
        else:
            head = chosen_head(model, self.config) if self.config.lm_head else None
            table = chosen_embedding(model, self.config, head)
        if self.pre_quantized:
            chosen = self._put_stored(model, chosen, head, table)
        else:
            self.config = self._planned(model, checkpoint, chosen, head, table)
        exact = loaded_exactly(chosen, checkpoint)
        replace_layers(model, chosen, self.config)
        weights = self._note_packed(model, checkpoint)
        if not self.pre_quantized:
            _load_dense(model, weights)
            dense = {key for name in config_key_by_module(head, table) for key in dense_names(model, name)}
            self._keep_precision(model, (weights | dense) - exact)
        return model

    def _chosen(
        self, model: PreTrainedModel, checkpoint: Checkpoint, layers: Mapping[str, nn.Module]
    ) -> dict[str, nn.Module]:
        """The modules that the files hold packed; of dense files, those that the config quantizes."""
        if self.pre_quantized and checkpoint.entries:  # what a file holds is not for names to decide
            return stored_layers(checkpoint, layers, self.config)
        chosen = layers_to_convert(model, self.config)
        if checkpoint.entries:
            check_dense(checkpoint, chosen)
        return chosen

    def _put_stored(
        self, model: PreTrainedModel, chosen: dict[str, nn.Module], head: Head | None, table: Embedding | None
    ) -> dict[str, nn.Module]:
        """Make room for a packed head and a packed embedding; the modules that are left to replace."""
        if head is not None:
            put_head(model, head, empty_layer(head.module, self.config.of_layer(head.name)))
        if table is not None:
            put_empty_embedding(model, table, self.config)
        others = config_key_by_module(head, table)
        return {name: module for name, module in chosen.items() if name not in others}

    def _planned(
        self,
        model: PreTrainedModel,
        checkpoint: Checkpoint,
        chosen: dict[str, nn.Module],
        head: Head | None,
        table: Embedding | None,
    ) -> SVDQConfig:
        """The config with its budget spent, after a look at whether all that it asks for is in the files."""
        if checkpoint.entries:
            for name, choice in config_key_by_module(head, table).items():
                check_source(checkpoint, name, dense_names(model, name), choice)
        modules = {name: module for name, module in chosen.items() if layout_of(module) is None}
        modules |= {one.name: one.module for one in (head, table) if one is not None}
        check_layer_k(modules, self.config)
        return spend(stored_weights(model, modules, checkpoint, self.config), self.config, {})

    def _note_packed(self, model: PreTrainedModel, checkpoint: Checkpoint) -> set[str]:
        """Tell packed weights what the files say of them; their names in the model."""
        self.packed, weights = [], set()
        for stored, parts, facts in packed_weights(model):
            self.packed.append(stored)
            weights.add(stored.key("weight"))
            facts.update(numbers(checkpoint.facts.get(stored.name, {})))
            for tensor in parts.values():
                # A family's own initialisation may reach for weights by name, and not know packed ones.
                tensor._is_hf_initialized = True  # type: ignore[attr-defined]
        if any(svdq_experts(model)):
            self.quantization_config.say_experts()
        self.partners = {name for group in checkpoint.partners if weights & set(group) for name in group}
        return weights

    def _keep_precision(self, model: PreTrainedModel, keys: Iterable[str]) -> None:
        """Have tensors loaded as they are: with dtype=bfloat16 an FP32 weight would be rounded beforehand.

        Salient weights are the checkpoint's own.
        """
        self.strict = model._keep_in_fp32_modules_strict
        exactly = {f"^{re.escape(key)}$" for key in keys}
        model._keep_in_fp32_modules_strict = set(self.strict or ()) | exactly

    def update_weight_conversions(self, weight_conversions: list[Any], *model: PreTrainedModel) -> list[Any]:
        """The tensors of packed experts are loaded as they are, whatever the family does to dense ones.

        model: as transformers gives it since 5.21.
        """
        conversions = super().update_weight_conversions(weight_conversions, *model)
        plain = unconverted(conversions, self.packed)
        if self.pre_quantized:
            return plain
        return [c if c in plain else without_stacking(c) for c in conversions]

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """Whether the tensor that the checkpoint has for `param_name` is still dense."""
        return not self.pre_quantized and (
            module_of(model, param_name) is not None or param_name in self.partners
        )

    def get_quantize_ops(self) -> SVDQQuantize:
        """The load-time conversion from a dense weight to stored parts."""
        return SVDQQuantize(self.config, self.failures)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if not self.pre_quantized:
            del model._get_dtype_plan  # the one of `_load_dense`; its class has another
            model._keep_in_fp32_modules_strict = self.strict
        if self.failures:
            raise ValueError(str(self.failures[0])) from self.failures[0]
        check_loaded(model, REMEDY if self.pre_quantized else DENSE_REMEDY)
        for _, layer in svdq_layers(model):
            if layer.salient_values.numel() == 0 and layer.salient_values.requires_grad:
                layer.salient_values.requires_grad_(False)  # nothing to train, and FSDP stumbles over it
        if not self.pre_quantized:
            self._quantize_loaded(model)
        keep_own_names(model)
        self.quantization_config.layer_k = self.config.layer_k
        write_layer_k_by_file_name(model, self.quantization_config)
        model.add_model_tags(tags(self.quantization_config.bits))  # for the card that push_to_hub writes
        return model

    def _quantize_loaded(self, model: PreTrainedModel) -> None:
        """Quantize the head and the input embedding, which are loaded dense, and tied."""
        head = find_head(model) if self.config.lm_head else None
        table = chosen_embedding(model, self.config, head)
        if head is None and table is None:
            return
        if is_spread(model):
            choice = next(iter(config_key_by_module(head, table).values()))
            raise ValueError(
                f"{choice}=True needs the model on one device while it is quantized: load it without "
                "device_map, save_pretrained() it, and load that with one"
            )
        if head is not None:
            quantize_head(model, self.config)
        if table is not None:
            quantize_embedding(model, table, self.config)
        for module in model.modules():
            reader = module.reader if isinstance(module, SVDQEmbedding) else module
            if isinstance(reader, TiedEmbedding):
                reader.dtype = model.config.dtype

    # Saving and the way back.

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[None, dict[str, str]]:
        """The plain state dict, and what quantizing measured for the file's header."""
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
        write_layer_k_by_file_name(model, self.quantization_config)  # config.json is written after this
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


DENSE_REMEDY = (
    "The checkpoint is damaged or does not fit its config.json; where a layer is to start anew, "
    "modules_to_not_convert keeps it dense"
)


def _load_dense(model: PreTrainedModel, weights: Iterable[str]) -> None:
    """Have weights to quantize loaded in the dtype asked for; before 5.23 it would be that of their bytes."""
    exactly = [f"^{re.escape(key)}$" for key in weights]
    plan = model._get_dtype_plan
    model._get_dtype_plan = lambda dtype: {**dict.fromkeys(exactly, dtype), **plan(dtype)}


def _refuse_sharded(model: PreTrainedModel) -> None:
    if getattr(model.config, "distributed_config", None) is not None:
        raise ValueError(
            "a quantized model is not sharded while it loads (distributed_config, tp_plan): a slice of a "
            "matrix has as many salient weights as fall into it. Load it whole; fully_shard(model) of "
            "FSDP2 and DistributedDataParallel wrap it as it is"
        )


patches.patch_main_dtype()
