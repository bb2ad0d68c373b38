"""Checks of a checkpoint's headers before anything is loaded; errors name the layer.

A dense checkpoint that is to be quantized has a plain weight for every layer (`check_dense`, `check_source`);
a quantized one has all parts of a layer, of the shapes and dtypes of `part_specs`, and no others
(`stored_layers`), and lacks no layer (`check_none_missing`). Not here: the tensors' values (`format.checks`).
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping

import torch
from torch import nn
from transformers import PreTrainedModel

from svdq_hf.config import SVDQConfig
from svdq_hf.format.files import REMEDY as SOURCE_REMEDY
from svdq_hf.format.names import WeightName
from svdq_hf.integrations.transformers.checkpoint_headers import REMEDY, Checkpoint, HeaderEntry
from svdq_hf.integrations.transformers.expert_conversions import is_merge
from svdq_hf.quantize.convert import check_layer_inputs
from svdq_hf.quantize.kept_dense import KeptDense
from svdq_hf.quantize.selection import convertible, weights_of
from svdq_hf.quantize.weight import check_source_dtype


def check_dense(checkpoint: Checkpoint, layers: Mapping[str, nn.Module]) -> None:
    """Refuse a dense checkpoint that lacks the weight of a layer, or has it quantized.

    Args:
        checkpoint: headers of the files.
        layers: the layers to quantize, by name.

    Raises:
        ValueError: no weight, one that is no plain float, or one that svdq has packed already.
    """
    for layer, module in layers.items():
        for stored in weights_of(layer, module):
            entry = checkpoint.entries.get(stored.key("weight"))
            if 0 in stored.shape:
                raise ValueError(
                    f"{stored.name}: by config.json this layer is {list(stored.shape)}, without weights; "
                    f"{SOURCE_REMEDY}"
                )
            if entry is None:
                raise ValueError(
                    f"{stored.name}: the checkpoint has no weights for this layer, and random ones cannot be "
                    f"trusted in few bits; load with modules_to_not_convert=[{layer!r}] to keep it dense and "
                    "train it"
                )
            if stored.key("salient_rows") in checkpoint.entries:
                raise ValueError(
                    f"could not quantize {stored.name}: it is quantized already, by svdq, and config.json "
                    "has lost its quantization_config; put that back"
                )
            check_source_dtype(stored.name, entry.dtype)
            _check_experts(stored, checkpoint)


def _check_experts(stored: WeightName, checkpoint: Checkpoint) -> None:
    """Refuse a stack of experts of which the files lack one, or have one of another shape than the rest."""
    sources = [
        entry
        for entry in checkpoint.sources.get(stored.key("weight"), [])
        if entry.conversion is not None and is_merge(entry.conversion)
    ]
    for pattern in dict.fromkeys(entry.pattern for entry in sources):
        group = [entry for entry in sources if entry.pattern == pattern]
        usual = Counter(entry.shape for entry in group).most_common(1)[0][0]
        for entry in group:
            if entry.shape != usual:
                raise ValueError(
                    f"{entry.name} is {list(entry.shape)}, and this tensor of other experts {list(usual)}; "
                    f"{SOURCE_REMEDY}"
                )
        if len(group) != stored.shape[0]:
            raise ValueError(
                f"{_missing_expert(group, stored.shape[0])} is missing: {stored.name} would be "
                f"{[len(group), *stored.shape[1:]]}, and is {list(stored.shape)}; {SOURCE_REMEDY}"
            )


def _missing_expert(group: list[HeaderEntry], experts: int) -> str:
    """The name of the first expert's tensor that is not there.

    Args:
        group: one tensor each of the experts that are there.
        experts: how many there are.
    """
    before, _, after = re.split(r"(?<=experts\.)(\d+)(?=\.)", group[0].name)
    there = {entry.name for entry in group}
    names = (f"{before}{number}{after}" for number in range(experts))
    return next((name for name in names if name not in there), group[-1].name)


def check_source(checkpoint: Checkpoint, name: str, keys: Iterable[str], choice: str) -> None:
    """Refuse to quantize a head, or an embedding, whose weight the files do not hold.

    Args:
        checkpoint: headers of the files.
        name: of the head or embedding, for errors.
        keys: tensor names that its weight may have.
        choice: the config key that selects it, for errors.

    Raises:
        ValueError: no weight, or one that is no plain float.
    """
    found = [checkpoint.entries[key] for key in keys if key in checkpoint.entries]
    if not found:
        raise ValueError(
            f"{name}: the checkpoint has no weights for it, and random ones cannot be trusted in few bits; "
            f"leave {choice} out, and train it"
        )
    for entry in found:
        check_source_dtype(name, entry.dtype)


def stored_layers(
    checkpoint: Checkpoint, layers: Mapping[str, nn.Module], config: SVDQConfig
) -> dict[str, nn.Module]:
    """The layers that are quantized in a checkpoint.

    The others are dense in the files, or absent (a pooler, a new head), and stay dense layers.

    Args:
        checkpoint: headers of the files.
        layers: the layers that may be quantized, by name.
        config: of the files, with names of the model.

    Raises:
        ValueError: a part is missing, there is one too many, or its shape or dtype is not that of
            `part_specs`; see also `check_layer_inputs`.
    """
    found = {
        name: module
        for name, module in layers.items()
        if any(_is_packed(stored, checkpoint) for stored in weights_of(name, module))
    }
    if not found:
        raise ValueError(
            f"config.json says svdq, and no layer of the files is quantized. {REMEDY}; or, where the model "
            "is meant to be dense, take quantization_config out of its config.json"
        )
    check_layer_inputs(found, config)
    for name, module in found.items():
        for stored in weights_of(name, module):  # of experts both, or none
            _check_stored(stored, checkpoint, config)
    return found


def check_none_missing(
    model: PreTrainedModel, checkpoint: Checkpoint, layers: Mapping[str, nn.Module], config: SVDQConfig
) -> None:
    """Refuse quantized files that lack a layer completely: as a dense layer it would be random.

    A layer may be absent if it is a new head or a pooler: outside of what is quantized, or, in a class other
    than the saved one, the only layer of its kind.

    Args:
        model: with its dense modules, on the meta device.
        checkpoint: headers of its files.
        layers: its modules that may be packed, by name.
        config: of the files.

    Raises:
        ValueError: it names the layer.
    """
    there = {name for name, module in layers.items() if _has_weights(name, module, checkpoint)}
    kinds = {_kind(name) for name in there if f"{name}.salient_rows" in checkpoint.entries}
    if type(model).__name__ in (model.config.architectures or []):
        expected = set(convertible(model, layers, KeptDense.of_file(config)))
    else:
        expected = {name for name in layers if _kind(name) in kinds and _kind(name) != name}
    tied = {name for tie in (model.all_tied_weights_keys or {}).items() for name in tie}
    for name in layers:
        if name in expected and name not in there and f"{name}.weight" not in tied:
            raise ValueError(f"{name}: the files have no weights for this layer. {REMEDY}")


def _has_weights(name: str, module: nn.Module, checkpoint: Checkpoint) -> bool:
    return any(stored.key("weight") in checkpoint.entries for stored in weights_of(name, module))


def _kind(name: str) -> str:
    """A layer's name without the number of its block.

    >>> _kind("encoder.layer.11.output.dense")
    'encoder.layer.#.output.dense'
    """
    return re.sub(r"(?<=\.)\d+(?=\.)", "#", name)


def _others(stored: WeightName, checkpoint: Checkpoint) -> set[str]:
    """The parts that a checkpoint has of a weight, beyond those of a dense layer."""
    prefix = stored.key("")
    there = {key.removeprefix(prefix) for key in checkpoint.entries if key.startswith(prefix)}
    return there - {"weight", "bias"}


def _is_packed(stored: WeightName, checkpoint: Checkpoint) -> bool:
    weight = checkpoint.entries.get(stored.key("weight"))
    packed = weight is not None and weight.dtype == torch.int8
    return packed or bool(_others(stored, checkpoint)) or stored.name in checkpoint.facts


def _check_stored(stored: WeightName, checkpoint: Checkpoint, config: SVDQConfig) -> None:
    linear = len(stored.shape) == 2  # experts have no k of their own
    specs = stored.specs((config.of_layer(stored.name) if linear else config).scheme)
    for part, spec in specs.items():
        entry = checkpoint.entries.get(stored.key(part))
        if entry is None:
            raise ValueError(f"{stored.name}: {part} is missing. {REMEDY}")
        if entry.whole and (entry.shape, entry.dtype) != spec:
            raise ValueError(
                f"{stored.name}: {part} is {list(entry.shape)} {entry.dtype}, "
                f"where the config says {list(spec.shape)} {spec.dtype}. {REMEDY}"
            )
    unknown = sorted(_others(stored, checkpoint) - specs.keys())
    if unknown:
        raise ValueError(f"{stored.name}: the config knows no {unknown}. {REMEDY}")
