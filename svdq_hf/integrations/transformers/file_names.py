"""Names of quantized weights in files, where transformers renames tensors while loading and saving.

The one place where a model's names and those of its files are translated: config.json and safetensors headers
have the files' names, everything in memory has the model's. Touches transformers' internals (5.20 to 5.24).
Not here: the names of a weight's parts (`format.names`).
"""

import re
from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightConverter, revert_weight_conversion

from svdq_hf.config import SVDQConfig
from svdq_hf.format.names import WeightName, part_key, weight_of_part
from svdq_hf.format.parts import PARTS
from svdq_hf.integrations.transformers.checkpoint_headers import REMEDY, Checkpoint
from svdq_hf.nn.inventory import packed_weights, svdq_layers

SALIENT = ".salient_rows"
"""Ending of a tensor name that every quantized linear layer has, and nothing else."""


def keep_own_names(model: PreTrainedModel) -> None:
    """Let quantized layers be saved under their own names.

    Where a family's files hold one tensor for several layers (a joint q, k, v), saving would join the
    packed parts as well, which only dense weights survive. Renamings are kept, except those that would
    give the parts of one weight different prefixes; where that weight is a linear layer's, all names stay the
    model's own.

    Args:
        model: a quantized model; changed in place.
    """
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:
        conversions = get_model_conversion_mapping(model, add_legacy=False)
        conversions = [c for c in conversions if not isinstance(c, PrefixChange)]  # as transformers does
    weights = [packed.stored for packed in packed_weights(model)]
    kept = [c for c in conversions if not (_produces(c, weights) or _splits_parts_of(c, weights))]
    # Such a renaming reads `proj` as `proj.weight`: `proj.weight` under the file's other names is lost.
    flat = [stored for stored in weights if len(stored.shape) == 2]
    model._weight_conversions = [] if any(_splits_parts_of(c, flat) for c in conversions) else kept


def unconverted(conversions: list[Any], packed: Iterable[WeightName]) -> list[Any]:
    """The conversions that do not make packed experts: packed experts are loaded as they are.

    Args:
        conversions: transformers' conversions for the model.
        packed: its packed weights.
    """
    stacks = [stored for stored in packed if len(stored.shape) == 3]
    return [c for c in conversions if not _produces(c, stacks)]


def _produces(conversion: Any, weights: Iterable[WeightName]) -> bool:
    return isinstance(conversion, WeightConverter) and any(
        re.search(target, stored.key("weight")) for target in conversion.target_patterns for stored in weights
    )


def _splits_parts_of(conversion: Any, weights: Iterable[WeightName]) -> bool:
    """Whether a renaming, undone while saving, gives the parts of one weight names of different weights."""
    if isinstance(conversion, WeightConverter):
        return False
    undo = conversion.reverse_transform()
    for stored in weights:
        names = {part: undo.rename_source_key(stored.key(part))[0] for part in PARTS}
        found = weight_of_part(names["salient_rows"])
        if found is None or names != {part: part_key(found[0], part, stacked=found[1]) for part in PARTS}:
            return True
    return False


def restore_names(model: PreTrainedModel, weights: Iterable[WeightName]) -> None:
    """Undo `keep_own_names` for a model that is dense again: its files get the family's names.

    Args:
        model: changed in place.
        weights: its weights that were quantized.
    """
    mapping = get_model_conversion_mapping(model, add_legacy=False)
    if any(isinstance(c, WeightConverter) or _splits_parts_of(c, weights) for c in mapping):
        model._weight_conversions = None


def file_names(model: PreTrainedModel) -> dict[str, str]:
    """The name in files of each quantized layer, by its name in the model."""
    parts = {one.stored.key("salient_rows"): one for one in packed_weights(model)}
    tensors = {key: one.parts["salient_rows"] for key, one in parts.items()}
    names = {id(tensor): parts[key].stored.name for key, tensor in tensors.items()}
    renamed = {
        tensor: weight_of_part(key) for key, tensor in revert_weight_conversion(model, tensors).items()
    }
    return {names[id(tensor)]: found[0] for tensor, found in renamed.items() if found is not None}


def layer_k_by_model_name(checkpoint: Checkpoint, config: SVDQConfig) -> SVDQConfig:
    """The config of a checkpoint with `layer_k` by the model's names; config.json has those of the files.

    Args:
        checkpoint: headers of the files.
        config: as config.json has it.

    Raises:
        ValueError: it names a layer that quantized files do not hold.
    """
    if config.layer_k is None:
        return config
    names = {
        entry.name.removesuffix(SALIENT): name.removesuffix(SALIENT)
        for name, entry in checkpoint.entries.items()
        if name.endswith(SALIENT)
    }
    strange = sorted(set(config.layer_k) - set(names)) if names else []
    if strange:
        raise ValueError(f"layer_k names {strange[0]!r}, which is no quantized layer of the files. {REMEDY}")
    return config.replace(layer_k={names.get(name, name): k for name, k in config.layer_k.items()})


def config_in_memory(model: PreTrainedModel, config: SVDQConfig) -> SVDQConfig:
    """The config of a quantized model with `layer_k` by the model's names.

    Args:
        model: quantized.
        config: as `model.hf_quantizer` has it, with names of files.
    """
    return config if config.layer_k is None else config.replace(layer_k=_held(model))


def config_in_files(model: PreTrainedModel, config: SVDQConfig) -> SVDQConfig:
    """The config of a quantized model as config.json has it.

    `layer_k` gets each layer's number of salient weights, keyed by the layer's name in saved files (which can
    differ from its name in the model). Inverse: `config_in_memory`.

    Args:
        model: quantized.
        config: its config; one without `layer_k` is returned unchanged.
    """
    if config.layer_k is None:
        return config
    names = file_names(model)
    return config.replace(layer_k={names[name]: k for name, k in _held(model).items()})


def _held(model: PreTrainedModel) -> dict[str, int]:
    """The number of salient weights of each quantized linear layer, by its name in the model."""
    return {name: layer.salient_values.shape[0] for name, layer in svdq_layers(model)}
