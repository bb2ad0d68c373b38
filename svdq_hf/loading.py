"""What a checkpoint holds, known from its headers before anything is loaded.

transformers loads tensor by tensor: a part that is missing ends as a line in a log, one of a wrong
dtype is cast, one that nobody asked for is dropped. So every tensor of every quantized layer is
compared with `part_specs` first, and one error names the layer. Here too: the names that layers have
in files, which transformers renames on the way in and out. Like `quantizer`, this file touches
transformers' internals (5.20 to 5.23). Not here: the values of tensors (`check_parts`).
"""

import copy
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.pytorch_utils import Conv1D

from svdq_hf.budget import Layer
from svdq_hf.config import SVDQConfig
from svdq_hf.convert import shape_of, svdq_layers
from svdq_hf.decompose import PARTS, Scheme, part_specs
from svdq_hf.footprint import stored_facts
from svdq_hf.weight import check_source_dtype

SALIENT = ".salient_rows"
"""What every quantized layer has, and no other."""

REMEDY = "The checkpoint is damaged or does not fit its config.json; quantize the original model again"
_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
    "I64": torch.int64, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32,
    "F64": torch.float64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


class Entry(NamedTuple):
    """One tensor of a file. whole: it is that tensor of the model, not a piece or a join of several."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype | str
    whole: bool
    file: str


@dataclass
class Checkpoint:
    """The tensors of a checkpoint by the model's names, and what its headers say of the layers.

    partners: tensors of the model that come out of one tensor of the files, in groups.
    """

    entries: dict[str, Entry] = field(default_factory=dict)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    partners: list[list[str]] = field(default_factory=list)


def read_checkpoint(model: PreTrainedModel, layers: Iterable[str], files: Iterable[str | Path]) -> Checkpoint:
    """Read the headers of safetensors `files` for a dense `model` whose `layers` are to be quantized."""
    files = [file for file in files if str(file).endswith(".safetensors")]
    rename = _Renaming(model, layers)
    result = Checkpoint()
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  # not a dict
                part = opened.get_slice(name)
                targets, whole = rename(name)
                dtype = _DTYPES.get(part.get_dtype(), part.get_dtype())
                entry = Entry(name, tuple(part.get_shape()), dtype, whole, str(file))
                result.entries |= dict.fromkeys(targets, entry)
                if len(targets) > 1:
                    result.partners.append(targets)
    for name, facts in stored_facts(files).items():
        result.facts[rename(f"{name}{SALIENT}")[0][0].removesuffix(SALIENT)] = facts
    return result


class _Renaming:
    """A file's name of a tensor -> the model's names of what it becomes, as the loader does it."""

    def __init__(self, model: PreTrainedModel, layers: Iterable[str]) -> None:
        conversions = copy.deepcopy(get_model_conversion_mapping(model))  # they note their own use
        self.renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
        self.converters = [c for c in conversions if isinstance(c, WeightConverter)]
        self.by_source = {source: c for c in self.converters for source in c.source_patterns}
        self.prefix = model.base_model_prefix
        self.known = dict.fromkeys(model.state_dict(), True)
        self.known |= {f"{layer}.{part}": True for layer in layers for part in PARTS}

    def __call__(self, name: str) -> tuple[list[str], bool]:
        rest = (self.prefix, self.known)
        renamed, source = rename_source_key(name, self.renamings, self.converters, *rest)
        if renamed not in self.known and name in self.known:
            renamed, source = rename_source_key(name, [], [], *rest)
        if source is None:
            return [renamed], True
        targets = self.by_source[source].target_patterns
        return [renamed.replace(targets[0], target) for target in targets], False


def check_dense(checkpoint: Checkpoint, layers: Iterable[str]) -> None:
    """Refuse a dense checkpoint that lacks the weight of a layer, or has it as something else.

    Raises:
        ValueError: no weight, one that is no plain float, or one that svdq has packed already.
    """
    for layer in layers:
        entry = checkpoint.entries.get(f"{layer}.weight")
        if entry is None:
            raise ValueError(
                f"{layer}: the checkpoint has no weights for this layer, and random ones cannot be trusted "
                f"in few bits; load with modules_to_not_convert=[{layer!r}] to keep it dense and train it"
            )
        if f"{layer}.salient_rows" in checkpoint.entries:
            raise ValueError(
                f"could not quantize {layer}: it is quantized already, by svdq, and config.json has lost its "
                "quantization_config; put that back"
            )
        check_source_dtype(layer, entry.dtype)


def stored_layers(
    checkpoint: Checkpoint, layers: Mapping[str, nn.Module], config: SVDQConfig
) -> dict[str, nn.Module]:
    """Those of `layers` that are quantized in a checkpoint.

    The rest it has dense, or never had (a pooler, a new head): those are dense layers here as well.

    Raises:
        ValueError: a part is missing, there is one too many, or its shape or dtype is not that of
            `part_specs`.
    """
    found = {}
    for name, module in layers.items():
        prefix = f"{name}."
        parts = {key.removeprefix(prefix) for key in checkpoint.entries if key.startswith(prefix)}
        weight = checkpoint.entries.get(f"{name}.weight")
        packed = parts - {"weight", "bias"} or (weight is not None and weight.dtype == torch.int8)
        if packed or name in checkpoint.facts:
            scheme = config.of_layer(name).scheme
            _check_layer(name, module, checkpoint, scheme)
            unknown = sorted(parts - {*part_specs(*shape_of(module), scheme), "bias"})
            if unknown:
                raise ValueError(f"{name}: the config knows no {unknown}. {REMEDY}")
            found[name] = module
    if not found:
        raise ValueError(f"config.json says svdq, and no layer of the files is quantized. {REMEDY}")
    return found


def _check_layer(name: str, module: nn.Module, checkpoint: Checkpoint, scheme: Scheme) -> None:
    for part, spec in part_specs(*shape_of(module), scheme).items():
        entry = checkpoint.entries.get(f"{name}.{part}")
        if entry is None:
            raise ValueError(f"{name}: {part} is missing. {REMEDY}")
        if entry.whole and (entry.shape, entry.dtype) != spec:
            raise ValueError(
                f"{name}: {part} is {list(entry.shape)} {entry.dtype}, "
                f"where the config says {list(spec.shape)} {spec.dtype}. {REMEDY}"
            )


def stored_weights(
    model: PreTrainedModel, modules: Mapping[str, nn.Module], checkpoint: Checkpoint, config: SVDQConfig
) -> dict[str, Layer]:
    """The weights of `modules`, each read from its file when it is asked for; none where there is no budget.

    Raises:
        ValueError: a weight is not a tensor of its own in the files.
    """
    found: dict[str, Layer] = {}
    if config.target_bits is None or config.layer_k is not None:
        return found
    tied = [{one, other} for one, other in (model.all_tied_weights_keys or {}).items()]
    for name, module in modules.items():
        weight = f"{name}.weight"
        same = {weight}.union(*(pair for pair in tied if weight in pair))
        entry = next((checkpoint.entries[key] for key in sorted(same) if key in checkpoint.entries), None)
        if entry is None or not entry.whole:
            raise ValueError(
                f"target_bits: the files have no tensor for {name} alone, so that its errors cannot be "
                "measured before loading: load the dense model, and call quantize_model(model, config)"
            )
        found[name] = Layer(*shape_of(module), partial(_read, entry, isinstance(module, Conv1D)))
    return found


def _read(entry: Entry, transposed: bool) -> Tensor:
    with safe_open(entry.file, framework="pt") as opened:
        weight: Tensor = opened.get_tensor(entry.name)
    return weight.T if transposed else weight


def keep_own_names(model: PreTrainedModel) -> None:
    """Let quantized layers be saved under their own names.

    Where a family's files hold one tensor for several layers (a joint q, k, v), saving would join the
    packed parts as well, which only a dense weight survives. Renamings stay.
    """
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:
        conversions = get_model_conversion_mapping(model, add_legacy=False)
        conversions = [c for c in conversions if not isinstance(c, PrefixChange)]  # as transformers does
    weights = [f"{name}.weight" for name, _ in svdq_layers(model)]
    model._weight_conversions = [c for c in conversions if not _makes(c, weights)]


def _makes(conversion: Any, weights: list[str]) -> bool:
    return isinstance(conversion, WeightConverter) and any(
        re.search(target, weight) for target in conversion.target_patterns for weight in weights
    )


def restore_names(model: PreTrainedModel) -> None:
    """The opposite, for a model that is dense again: files as the family has them."""
    mapping = get_model_conversion_mapping(model, add_legacy=False)
    if any(isinstance(conversion, WeightConverter) for conversion in mapping):
        model._weight_conversions = None


def file_names(model: PreTrainedModel) -> dict[str, str]:
    """The name in files of each quantized layer, by its name in the model."""
    tensors = {f"{name}{SALIENT}": layer.salient_rows for name, layer in svdq_layers(model)}
    names = {id(tensor): name.removesuffix(SALIENT) for name, tensor in tensors.items()}
    stored = revert_weight_conversion(model, tensors)
    return {names[id(tensor)]: name.removesuffix(SALIENT) for name, tensor in stored.items()}


def named_k(checkpoint: Checkpoint, config: SVDQConfig) -> SVDQConfig:
    """The config of a checkpoint, its `layer_k` by the model's names: config.json has those of the files."""
    if config.layer_k is None:
        return config
    names = {
        entry.name.removesuffix(SALIENT): name.removesuffix(SALIENT)
        for name, entry in checkpoint.entries.items()
        if name.endswith(SALIENT)
    }
    return config.changed(layer_k={names.get(name, name): k for name, k in config.layer_k.items()})


def name_k(model: PreTrainedModel, config: SVDQConfig) -> None:
    """Let `layer_k` say what the layers of `model` hold, by their names in files."""
    if config.layer_k is not None:
        names = file_names(model)
        config.layer_k = {names[name]: layer.salient_values.shape[0] for name, layer in svdq_layers(model)}
