"""Safetensors files, byte by byte: what is there, checked before anything is made, and read in pieces.

The library maps whole files, and a mapped page that was read counts as the process's memory; so bytes are
read from their place here. What a header may say is still for the library to judge. Not here: what becomes
of a tensor (`plan`, `shard`).
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from svdq_hf.format.files import DTYPES, INDEX, REMEDY, WEIGHTS, open_tensors, read_index, weight_files
from svdq_hf.format.parts import PartSpec

PIECE = 1 << 24
"""Bytes read at a time where a tensor need not be there as a whole; a multiple of every item's size."""

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Place(NamedTuple):
    """Where a tensor is: `size` bytes of `file` from `start` on. dtype: as safetensors calls it."""

    file: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


def tensor_places(folder: str | Path) -> dict[str, Place]:
    """All tensors of the files that `from_pretrained` reads from a folder, by their names in files.

    Raises:
        ValueError: there are no such files, one is missing or damaged, the index is not what they hold, or
            two of them hold a tensor of one name.
    """
    folder = Path(folder)
    if (folder / WEIGHTS).is_file():
        return _header(folder / WEIGHTS)
    if not (folder / INDEX).is_file():
        there = ", ".join(sorted(file.name for file in folder.glob("*.safetensors"))[:3])
        variant = re.match(r"model\.(\w+)\.safetensors", there)
        remedy = (
            f'; load that in Python, from_pretrained(folder, variant="{variant[1]}"), and save it again'
            if variant
            else ""
        )
        raise ValueError(
            f"{folder}: neither {WEIGHTS} nor {INDEX} is there, but {there or 'no weights'}{remedy}"
        )
    places: dict[str, Place] = {}
    index = read_index(folder / INDEX)
    for file in weight_files(folder):
        for tensor, place in _header(file).items():
            if tensor in places:
                both = f"{Path(places[tensor].file).name} and {file.name}"
                raise ValueError(f"{folder}: {tensor} is in two files, {both}: which one is meant? {REMEDY}")
            places[tensor] = place
    _check_index(folder, index, places)
    return places


def _check_index(folder: Path, index: Mapping[str, str], places: Mapping[str, Place]) -> None:
    for tensor in sorted(index.keys() | places.keys()):
        said, found = index.get(tensor), places.get(tensor)
        where = Path(found.file).name if found is not None else None
        if said != where:
            told = f"{INDEX} has {tensor} in {said or 'no file'}, and it is in {where or 'none'}"
            raise ValueError(f"{folder}: {told}; {REMEDY}")


def _header(file: Path) -> dict[str, Place]:
    """The tensors of one file; the library checks that they fill it, without holes or overlaps."""
    with open_tensors(file):
        pass
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header: dict[str, Any] = json.loads(opened.read(length))
    header.pop("__metadata__", None)
    places = {}
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        shape = tuple(entry["shape"])
        places[name] = Place(str(file), name, entry["dtype"], shape, 8 + length + start, stop - start)
    return places


def read_bytes(place: Place) -> Tensor:
    """A tensor's bytes, `[size]` uint8."""
    return next(read_pieces(place, max(place.size, 1)))


def as_tensor(data: Tensor, place: Place) -> Tensor:
    """The tensor `place.shape` that these bytes are."""
    return data.view(DTYPES[place.dtype]).reshape(place.shape)


def read_pieces(place: Place, piece: int = PIECE) -> Iterator[Tensor]:
    """A tensor's bytes, uint8, in pieces; one empty piece of a tensor without entries.

    Raises:
        OSError: the file has become shorter since its header was read, or the disk fails.
    """
    with open(place.file, "rb", buffering=0) as file:
        file.seek(place.start)
        left = place.size
        while True:
            data = torch.empty(min(piece, left), dtype=torch.uint8)
            view, done = data.numpy().data, 0
            while done < len(view):
                count = file.readinto(view[done:])  # a system reads no more than 2 GiB at once
                if not count:
                    raise OSError(f"{place.file}: ends within {place.name}; {REMEDY}")
                done += count
            yield data
            left -= done
            if not left:
                return


def layout(tensors: Mapping[str, PartSpec]) -> dict[str, int]:
    """Where each tensor starts in a file's data: wide items first, so that every one is aligned.

    >>> layout({"a": PartSpec((3,), torch.int8), "b": PartSpec((2,), torch.float32)})
    {'b': 0, 'a': 8}
    """
    starts, end = {}, 0
    for name in sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name)):
        starts[name] = end
        end += size_of(tensors[name])
    return starts


def size_of(spec: PartSpec) -> int:
    """Bytes of a tensor."""
    return spec.dtype.itemsize * torch.Size(spec.shape).numel()


def header_bytes(tensors: Mapping[str, PartSpec], metadata: Mapping[str, str]) -> bytes:
    """What a safetensors file has before its data: the header's length, and the header."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    for name, start in layout(tensors).items():
        shape, dtype = tensors[name]
        ends = [start, start + size_of(tensors[name])]
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": ends}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def readable(size: int) -> str:
    """Bytes in the unit that fits.

    >>> readable(13_476_000_000), readable(90_900)
    ('13.48 GB', '0.1 MB')
    """
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
