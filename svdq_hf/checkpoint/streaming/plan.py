"""Plan of a streamed run: which tensor of the output is made of which bytes of the input.

transformers itself provides it: `from_pretrained` onto the meta device reads nothing and leaves the model as
loading would leave it, with its names, dtypes and ties, and with all refusals. Where the saved tensors do
not follow from that one by one, `Unstreamable` is raised, and the model is quantized in memory. Not here:
carrying it out (`checkpoint.streaming.resume`).
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svdq_hf.checkpoint.load import load_complete
from svdq_hf.checkpoint.source import Source
from svdq_hf.checkpoint.streaming.byte_ranges import Place
from svdq_hf.checkpoint.streaming.mapping import head_readers, make_units
from svdq_hf.checkpoint.streaming.unit import Unit, Unstreamable
from svdq_hf.config import SVDQConfig
from svdq_hf.format.files import INDEX, WEIGHTS
from svdq_hf.format.metadata import layers_metadata
from svdq_hf.format.names import WeightName
from svdq_hf.format.parts import PartSpec
from svdq_hf.integrations.transformers.checkpoint_headers import read_checkpoint
from svdq_hf.integrations.transformers.file_names import config_in_memory, file_names
from svdq_hf.nn.inventory import packed_weights
from svdq_hf.quantize.footprint import Footprint, footprint


@dataclass(frozen=True)
class Shard:
    """One file of the output.

    Attributes:
        number: from 1 on.
        file: its name.
        units: what it holds, in order.
    """

    number: int
    file: str
    units: tuple[Unit, ...]

    @property
    def outputs(self) -> dict[str, PartSpec]:
        """Shape and dtype of its tensors, by name."""
        return {name: spec for unit in self.units for name, spec in unit.outputs.items()}

    @property
    def size(self) -> int:
        """Bytes of its tensors."""
        return sum(unit.size for unit in self.units)

    @property
    def input_size(self) -> int:
        """Bytes of the input that are read for it."""
        return sum(unit.input_size for unit in self.units)

    @property
    def places(self) -> list[Place]:
        """Places of the input that are read for it, in order."""
        return [place for unit in self.units for place in unit.places]


@dataclass(frozen=True)
class StreamPlan:
    """A model on the meta device, as it will be saved, and the bytes that its files are made of.

    Attributes:
        model: the quantized model on the meta device.
        config: how it is quantized.
        files: paths of the input files.
        shards: files of the output.
    """

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
        """Sizes of the quantized model; no errors, since nothing is quantized yet."""
        return footprint(self.model)

    def metadata(self, facts: Mapping[str, Mapping[str, float]]) -> dict[str, str]:
        """The metadata for the header of every file.

        Args:
            facts: what was measured, by the layer's name in the model.
        """
        names = file_names(self.model)
        layers = {
            names[stored.name]: {"shape": list(stored.shape), **facts[stored.name]}
            for stored, _, _ in packed_weights(self.model)
        }
        return {"format": "pt", **layers_metadata(layers)}

    def write_config(self, folder: Path) -> None:
        """Write config.json, generation_config.json and the index, as `save_pretrained` does.

        Args:
            folder: of the output.
        """
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


def make_plan(
    source: Source, config: SVDQConfig, shard_size: int, dtype: str | None = None, *, has_data: bool = False
) -> StreamPlan:
    """Plan how a model is quantized file by file.

    Args:
        source: the model's folder.
        config: how it is quantized.
        shard_size: about how many bytes a file of the output has.
        dtype: of what stays dense; None: as in the files.
        has_data: whether there are calibration batches.

    Raises:
        Unstreamable: it must be quantized in memory.
        ValueError: it cannot be quantized at all: see `tensor_places` and `load_complete`.
    """
    kind = source.kind
    _check_usual(source, config, has_data=has_data)
    files = tuple(sorted({place.file for place in source.places.values()}))
    try:
        model, _ = load_complete(
            kind,
            source.folder,
            named=config.modules_to_not_convert or (),
            quantization_config=config,
            device_map={"": "meta"},
            dtype=dtype or "auto",
        )
    except (RuntimeError, NotImplementedError) as error:  # if it is of the model, memory tells it as well
        raise Unstreamable(f"it cannot be planned ({error})") from error
    weights = [stored for stored, _, _ in packed_weights(model)]
    readers = [WeightName(name, ()) for name in head_readers(model)]
    checkpoint = read_checkpoint(model, [*weights, *readers], files)
    try:
        units = make_units(model, checkpoint, source.places)
    except Unstreamable as error:
        error.footprint = footprint(model)
        raise
    config = config_in_memory(model, model.hf_quantizer.quantization_config)
    return StreamPlan(model, config, files, _shards(units, shard_size))


def _check_usual(source: Source, config: SVDQConfig, *, has_data: bool) -> None:
    """Refuse configs and models that are never streamed, whatever the files hold."""
    if config.synthetic:
        raise Unstreamable(
            "the dense model makes its calibration batches and reads them, which takes minutes"
        )
    if config.activations is not None:
        raise Unstreamable("for integer activations it is rotated as a whole")
    if config.target_bits is not None and config.layer_k is None:
        raise Unstreamable("its budget is spent over all layers, which are measured first")
    if has_data:
        raise Unstreamable("calibration runs the dense model")
    if config.data_needs:
        raise config.no_data()
    model_config = getattr(source.kind, "config_class", None)
    if any((source.folder / name).is_file() for name in getattr(model_config, "extra_files", ())):
        raise Unstreamable("it has weights in files of names of their own")
    if "transformers_weights" in source.stored:
        raise Unstreamable("its config.json names a file of weights of its own")


def _shards(units: Iterable[Unit], shard_size: int) -> tuple[Shard, ...]:
    """Distribute units over files of at most `shard_size` bytes, or of one larger unit."""
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
