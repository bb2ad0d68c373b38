"""From checkpoint to checkpoint: which tensor of the output is made of which bytes of the input?

transformers says it itself: `from_pretrained` onto the meta device, where nothing is read, leaves the model
as loading would leave it, with its names, dtypes and ties, and all refusals. Where what would be saved does
not follow from that tensor by tensor, there is an `Unstreamable`, and the model is quantized in memory.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from svdq_hf.config import SVDQConfig
from svdq_hf.convert import svdq_layers
from svdq_hf.decompose import PartSpec
from svdq_hf.embedding import SVDQEmbedding
from svdq_hf.experts import svdq_experts
from svdq_hf.footprint import Footprint, footprint
from svdq_hf.loading import Checkpoint, read_checkpoint
from svdq_hf.names import Stored
from svdq_hf.opening import INDEX, WEIGHTS
from svdq_hf.packed import packed_weights
from svdq_hf.source import load_complete
from svdq_hf.streaming.files import DTYPE_NAMES, Place, tensor_places
from svdq_hf.streaming.units import Unit, Unstreamable, expert_places


@dataclass(frozen=True)
class Shard:
    """One file of the output. number: from 1 on."""

    number: int
    file: str
    units: tuple[Unit, ...]

    @property
    def outputs(self) -> dict[str, PartSpec]:
        """Its tensors by name."""
        return {name: spec for unit in self.units for name, spec in unit.outputs.items()}

    @property
    def size(self) -> int:
        """Bytes of its tensors."""
        return sum(unit.size for unit in self.units)

    @property
    def input_size(self) -> int:
        """Bytes that are read for it."""
        return sum(unit.input_size for unit in self.units)

    @property
    def places(self) -> list[Place]:
        """What is read for it, in order."""
        return [place for unit in self.units for place in unit.places]


@dataclass(frozen=True)
class Plan:
    """A model on the meta device, as it will be saved, and what its files are made of."""

    model: Any
    config: SVDQConfig
    files: tuple[str, ...]
    shards: tuple[Shard, ...]

    @property
    def size(self) -> int:
        """Bytes of the tensors of all shards."""
        return sum(shard.size for shard in self.shards)

    @property
    def footprint(self) -> Footprint:
        """What the quantized model will weigh; nothing is measured yet."""
        return footprint(self.model)

    def metadata(self, facts: Mapping[str, Mapping[str, float]]) -> dict[str, str]:
        """What each file's header says, given what was measured of each layer."""
        for stored, _, measured in packed_weights(self.model):
            measured.clear()
            measured.update(facts[stored.name])
        _, metadata = self.model.hf_quantizer.get_state_dict_and_metadata(self.model)
        return {"format": "pt", **metadata}

    def write_config(self, folder: Path) -> None:
        """Write config.json, generation_config.json and the index, as `save_pretrained` does."""
        model = self.model
        model.config.dtype = str(model.dtype).removeprefix("torch.")
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)
        if model.can_generate():
            model.generation_config.save_pretrained(folder)
        if len(self.shards) > 1:
            weights = {name: shard.file for shard in self.shards for name in shard.outputs}
            metadata = {"total_parameters": model.num_parameters(), "total_size": self.size}
            index = {"metadata": metadata, "weight_map": weights}
            (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def make_plan(model_class: Any, source: Path, config: SVDQConfig, shard_size: int) -> Plan:
    """How the model in the folder `source` becomes a quantized one, in files of about `shard_size` bytes.

    Raises:
        Unstreamable: it must be quantized in memory.
        ValueError: it cannot be quantized at all: see `tensor_places` and `load_complete`.
    """
    _check_usual(model_class, source, config)
    places = tensor_places(source)
    files = tuple(sorted({place.file for place in places.values()}))
    try:
        model, _ = load_complete(
            model_class,
            source,
            named=config.modules_to_not_convert or (),
            quantization_config=config,
            device_map={"": "meta"},
        )
    except (RuntimeError, NotImplementedError) as error:  # if it is of the model, memory tells it as well
        raise Unstreamable(f"it cannot be planned ({error})") from error
    weights = [stored for stored, _, _ in packed_weights(model)]
    readers = [Stored(name, ()) for name in _readers(model)]
    checkpoint = read_checkpoint(model, [*weights, *readers], files)
    try:
        units = _units(model, checkpoint, places)
    except Unstreamable as error:
        error.footprint = footprint(model)
        raise
    config = model.hf_quantizer.config  # with what loading has found out, by the model's names
    return Plan(model, config, files, _shards(units, shard_size))


def _check_usual(model_class: Any, source: Path, config: SVDQConfig) -> None:
    """What is not streamed whatever the files hold."""
    if config.synthetic:
        raise Unstreamable("its error feedback runs the dense model")
    if config.target_bits is not None and config.layer_k is None:
        raise Unstreamable("its budget is spent over all layers, which are measured first")
    if config.data_needs:
        raise config.no_data()
    model_config = model_class.config_class if hasattr(model_class, "config_class") else None
    if any((source / name).is_file() for name in getattr(model_config, "extra_files", ())):
        raise Unstreamable("it has weights in files of names of their own")
    if "transformers_weights" in json.loads((source / "config.json").read_text()):
        raise Unstreamable("its config.json names a file of weights of its own")


def _units(model: PreTrainedModel, checkpoint: Checkpoint, places: Mapping[str, Place]) -> list[Unit]:
    """What is to be made, in the order of the model.

    Raises:
        Unstreamable: a tensor that would be saved is not made of one tensor of the files.
    """
    _check_sources(model, checkpoint, places)
    state = model.state_dict()
    parts = {weight.key(part): (weight, part) for weight, found, _ in packed_weights(model) for part in found}
    units: dict[str, Unit] = {}
    for stored, name in saved_tensors(model).items():
        spec = PartSpec(tuple(state[name].shape), state[name].dtype)
        if name in parts:
            weight, part = parts[name]
            unit = units.get(weight.name) or _of_weight(weight, model, checkpoint, places)
            outputs = {**unit.outputs, stored: spec}
            units[weight.name] = replace(unit, outputs=outputs, parts=(*unit.parts, part))
            continue
        place = _whole(name, model, checkpoint, places)
        if spec.shape != place.shape:
            raise Unstreamable(f"{name} is {list(spec.shape)}, and {list(place.shape)} in the files")
        units[name] = Unit((place,), {stored: spec})
    return list(units.values())


def _of_weight(
    weight: Stored, model: PreTrainedModel, checkpoint: Checkpoint, places: Mapping[str, Place]
) -> Unit:
    """The unit of a quantized weight, or of all experts' matrices, without outputs yet."""
    if len(weight.shape) == 3:
        transposed = dict(svdq_experts(model))[weight.name.rpartition(".")[0]].layout.transposed
        found, turned = expert_places(weight, checkpoint, places, transposed=transposed)
        return Unit(found, {}, weight, transposed=transposed, turned=turned)
    place = _whole(weight.key("weight"), model, checkpoint, places)
    return Unit((place,), {}, weight, transposed=dict(svdq_layers(model))[weight.name].transposed)


def _whole(name: str, model: PreTrainedModel, checkpoint: Checkpoint, places: Mapping[str, Place]) -> Place:
    """Where the one tensor is that is `name` in the model."""
    entry = checkpoint.entries.get(_source(model, checkpoint, name))
    if entry is None or not entry.whole:
        why = "which the files do not hold" if entry is None else "made of a tensor that is joined or cut"
        raise Unstreamable(f"it has {name}, {why}")
    return places[entry.name]


def saved_tensors(model: PreTrainedModel) -> dict[str, str]:
    """What `save_pretrained` writes: name in files -> name in the model, ties once.

    Raises:
        Unstreamable: it joins tensors, or this model saves in a way of its own.
    """
    if type(model).save_pretrained is not PreTrainedModel.save_pretrained:
        raise Unstreamable(f"{type(model).__name__} has a save_pretrained of its own")
    state = model.state_dict()
    for name in model._keys_to_ignore_on_save or ():
        state.pop(name, None)
    state = remove_tied_weights_from_state_dict(state, model)
    names = {id(tensor): name for name, tensor in state.items()}
    stored = revert_weight_conversion(model, state)
    joined = [name for name, tensor in stored.items() if id(tensor) not in names]
    if joined or len(stored) != len(state):
        raise Unstreamable(f"its files join or cut tensors ({joined[0] if joined else 'one is gone'})")
    return {name: names[id(tensor)] for name, tensor in stored.items()}


def _check_sources(model: PreTrainedModel, checkpoint: Checkpoint, places: Mapping[str, Place]) -> None:
    """Refuse what a name alone does not tell: two tensors for one, ties to compare, unknown dtypes."""
    known = {*model.state_dict(), *(f"{name}.weight" for name in _readers(model))}
    known -= {stored.name for stored, _, _ in packed_weights(model) if len(stored.shape) == 3}
    for name, entries in checkpoint.sources.items():
        if len(entries) > 1 and name in known:
            one = entries[0].name
            raise Unstreamable(f"several tensors of its files become one of the model ({one} is one)")
    for one, other in (model.all_tied_weights_keys or {}).items():
        if one in checkpoint.entries and other in checkpoint.entries:
            raise Unstreamable(f"{one} and {other} are tied and both in the files: they must be compared")
    for place in places.values():
        if place.dtype not in DTYPE_NAMES.values():
            raise Unstreamable(f"{place.name} is {place.dtype}")


def _source(model: PreTrainedModel, checkpoint: Checkpoint, name: str) -> str:
    """The name, of those that a tied tensor has, that the files know."""
    if name in checkpoint.entries:
        return name
    state = model.state_dict(keep_vars=True)
    same = [other for other, tensor in state.items() if tensor is state.get(name)]
    same += [f"{reader}.weight" for reader, head in _readers(model).items() if name == f"{head}.weight"]
    return next((other for other in same if other in checkpoint.entries), name)


def _readers(model: PreTrainedModel) -> dict[str, str]:
    """Embeddings that read a quantized head's rows, and so have no tensor: name -> the head's."""
    heads = {id(layer): name for name, layer in svdq_layers(model)}
    modules = model.named_modules()
    return {name: heads[id(module.head)] for name, module in modules if isinstance(module, SVDQEmbedding)}


def _shards(units: Iterable[Unit], shard_size: int) -> tuple[Shard, ...]:
    """Units into files of at most `shard_size` bytes, or of one unit."""
    groups: list[list[Unit]] = []
    size = 0
    for unit in units:
        if not groups or size + unit.size > shard_size:
            groups.append([])
            size = 0
        groups[-1].append(unit)
        size += unit.size
    count = len(groups)
    names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    names = names if count > 1 else [WEIGHTS]
    files = enumerate(zip(names, groups, strict=True), 1)
    return tuple(Shard(number, name, tuple(group)) for number, (name, group) in files)
