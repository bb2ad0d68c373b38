"""Shard: one file of the output; its data is made and recorded, checked when a run goes on, given a header.

The header contains what quantizing measured in all layers, so it is known last: until then the data is in a
separate file, beside a record of checksums. A record exists only when its data is complete. Not here: which
shards there are (`checkpoint.streaming.plan`), and the loop over them (`checkpoint.streaming.resume`).
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from svdq_hf.checkpoint.streaming.byte_ranges import PIECE, Place, header_bytes, layout, read_pieces, size_of
from svdq_hf.checkpoint.streaming.plan import Shard
from svdq_hf.checkpoint.streaming.unit import Unit
from svdq_hf.checkpoint.unfinished import model_folder
from svdq_hf.config import SVDQConfig
from svdq_hf.format.dtypes import DTYPES
from svdq_hf.format.files import _sync, write_atomically
from svdq_hf.format.names import WeightName
from svdq_hf.quantize.expert_stream import LazyStack
from svdq_hf.quantize.weight import quantize_stack, quantize_weight

Told = Callable[[int], None]
"""A function that is called with the number of input bytes read."""


class _Input:
    """Reads places of the input; `digests` are the checksums of what was read, in order."""

    def __init__(self, told: Told) -> None:
        self.digests: list[str] = []
        self.told = told

    def pieces(self, place: Place, piece: int = PIECE) -> Iterator[Tensor]:
        """`read_pieces`, with checksum and progress."""
        read = hashlib.sha256()
        for data in read_pieces(place, piece):
            read.update(data.numpy().data)
            yield data
        self.digests.append(read.hexdigest())
        self.told(place.size)

    def whole(self, place: Place) -> Tensor:
        """All bytes of a place, `[size]` uint8."""
        (data,) = self.pieces(place, max(place.size, 1))
        return data


def make_shard(shard: Shard, config: SVDQConfig, folder: Path, told: Told) -> None:
    """Make the data and the record of a shard; a kill leaves no record.

    Args:
        shard: what to make.
        config: how weights are quantized.
        folder: where the work is done.
        told: called with the number of bytes read.

    Raises:
        ValueError: see `quantize_weight`.
        OSError: the input file has become shorter, or the disk failed.
    """
    record_file(shard, folder).unlink(missing_ok=True)
    starts = layout(shard.outputs)
    made = hashlib.sha256()
    source = _Input(told)
    facts: dict[str, dict[str, float]] = {}
    with open(data_file(shard, folder), "wb") as file:
        file.truncate(shard.size)
        for unit in shard.units:
            outputs, measured = _made(unit, config, source)
            facts |= measured
            for name, data in outputs:
                file.seek(starts[name])
                starts[name] += data.numel()
                file.write(data.numpy().data)
                made.update(data.numpy().data)
        _sync(file)
    record = {"made": made.hexdigest(), "inputs": source.digests, "facts": facts}
    write_atomically(record_file(shard, folder), json.dumps(record))


def _made(
    unit: Unit, config: SVDQConfig, source: _Input
) -> tuple[Iterator[tuple[str, Tensor]], dict[str, dict[str, float]]]:
    """Names and bytes of a unit's outputs, piece by piece, and the facts measured of its weight."""
    if unit.weight is None:
        return _copied(unit, source), {}
    parts, facts = _quantized(unit, unit.weight, config, source)
    return _stored(unit, parts), {unit.weight.name: facts}


def _copied(unit: Unit, source: _Input) -> Iterator[tuple[str, Tensor]]:
    """The bytes of a tensor that stays dense, cast where the dtypes differ."""
    ((name, spec),), (place,) = unit.outputs.items(), unit.places
    for data in source.pieces(place):
        piece = data.view(DTYPES[place.dtype]).to(spec.dtype)
        if unit.bias_of and not torch.isfinite(piece).all():
            raise ValueError(f"{unit.bias_of}: {name} has a NaN or an infinity: the checkpoint is damaged")
        yield name, as_bytes(piece)


def _stored(unit: Unit, parts: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The bytes of a weight's parts; their shapes must be the planned ones."""
    for part, (name, spec) in zip(unit.parts, unit.outputs.items(), strict=True):
        if (tuple(parts[part].shape), parts[part].dtype) != spec:
            raise ValueError(f"{name}: {list(parts[part].shape)} {parts[part].dtype}, planned was {spec}")
        yield name, as_bytes(parts[part])


def _quantized(
    unit: Unit, weight: WeightName, config: SVDQConfig, source: _Input
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The parts of a weight and the facts measured; of experts, one is in memory at a time."""
    matrices = unit.matrices(source.whole)
    if len(weight.shape) == 3:
        stack = LazyStack(weight.dense_shape(transposed=unit.transposed), matrices)
        return quantize_stack(stack, config, weight.name, transposed=unit.transposed)
    (dense,) = matrices
    return quantize_weight(dense.T.contiguous() if unit.transposed else dense, config, weight.name)


def as_bytes(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, `[size]`, uint8.

    Args:
        tensor: `[...]`, of any shape and dtype.
    """
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def finished_record(shard: Shard, folder: Path, told: Told) -> bool:
    """Whether a shard's data is complete and unchanged since it was made.

    Args:
        shard: the shard.
        folder: where the work is done.
        told: called with the number of bytes read.

    Raises:
        ValueError: the input is no longer the one that it was made of.
    """
    record = read_record(shard, folder)
    place = _data_of(shard, folder)
    if record is None or place is None:
        return False
    source = _Input(told)
    for at, digest in zip(shard.places, record["inputs"], strict=True):
        for _ in source.pieces(at):
            pass
        if source.digests[-1] != digest:
            raise ValueError(
                f"{at.file}: {at.name} is not what it was when the first run read it; "
                "begin anew with --restart"
            )
    made: str = record["made"]
    return _digest(shard, *place) == made


def _digest(shard: Shard, path: Path, start: int) -> str:
    """The checksum of a shard's data, in the order in which it was made."""
    made, starts = hashlib.sha256(), layout(shard.outputs)
    with open(path, "rb") as file:
        for name, spec in shard.outputs.items():
            file.seek(start + starts[name])
            left = size_of(spec)
            while left and (data := file.read(min(left, PIECE))):
                made.update(data)
                left -= len(data)
    return made.hexdigest()


def _data_of(shard: Shard, folder: Path) -> tuple[Path, int] | None:
    """The file that has the shard's data, and where the data starts in it."""
    if data_file(shard, folder).exists():
        return data_file(shard, folder), 0
    whole = model_folder(folder) / shard.file
    if not whole.exists():
        return None
    with open(whole, "rb") as file:
        return whole, 8 + int.from_bytes(file.read(8), "little")


def add_header(shard: Shard, metadata: Mapping[str, str], folder: Path) -> None:
    """Join header and data into the final file; a shard that is complete stays as it is.

    Args:
        shard: the shard.
        metadata: for the header.
        folder: where the work is done.
    """
    data, whole = data_file(shard, folder), model_folder(folder) / shard.file
    if not data.exists():
        return
    partial = whole.with_suffix(".partial")
    with open(partial, "wb") as file, open(data, "rb") as source:
        file.write(header_bytes(shard.outputs, metadata))
        shutil.copyfileobj(source, file, PIECE)
        _sync(file)
    os.replace(partial, whole)
    data.unlink()


def read_record(shard: Shard, folder: Path) -> dict[str, Any] | None:
    """The record of a shard; None where it is not finished, or the record is damaged."""
    try:
        record = json.loads(record_file(shard, folder).read_text())
    except (FileNotFoundError, ValueError, RecursionError):
        return None
    return record if _is_record(record, shard) else None


def _is_record(record: Any, shard: Shard) -> bool:
    if not isinstance(record, dict) or not isinstance(record.get("made"), str):
        return False
    inputs, facts = record.get("inputs"), record.get("facts")
    weights = {unit.weight.name for unit in shard.units if unit.weight is not None}
    return (
        isinstance(inputs, list)
        and len(inputs) == len(shard.places)
        and isinstance(facts, dict)
        and facts.keys() == weights
        and all(isinstance(measured, dict) for measured in facts.values())
    )


def record_file(shard: Shard, folder: Path) -> Path:
    """Path of a shard's record: its checksums and facts."""
    return folder / f"{shard.number:05d}.json"


def data_file(shard: Shard, folder: Path) -> Path:
    """Path of a shard's data without its header."""
    return folder / f"{shard.number:05d}.data"
