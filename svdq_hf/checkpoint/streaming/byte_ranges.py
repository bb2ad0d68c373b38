"""Byte ranges of the tensors in safetensors files: found in the headers, checked, and read in pieces.

The library maps whole files, and a mapped page that was read counts as the process's memory; so bytes are
read from their place here. Whether a header is valid is still left to the library. Not here: what is made of
a tensor (`checkpoint.streaming.plan`, `checkpoint.streaming.shard`).
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from svdq_hf.format.dtypes import DTYPES
from svdq_hf.format.files import INDEX, REMEDY, WEIGHTS, open_tensors, read_index, weight_files
from svdq_hf.format.parts import PartSpec

PIECE = 1 << 24
"""Bytes read at a time where a tensor is not needed as a whole; a multiple of every item's size."""

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Place(NamedTuple):
    """Where a tensor is in a file.

    Attributes:
        file: path of the file.
        name: of the tensor in the file.
        dtype: name of its dtype in safetensors.
        shape: of the tensor.
        start: first byte in the file.
        size: number of bytes.
    """

    file: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


def tensor_places(folder: str | Path) -> dict[str, Place]:
    """Where each tensor is in the files that `from_pretrained` reads from a folder.

    Args:
        folder: of the model.

    Returns:
        The places by the tensor's name in files.

    Raises:
        ValueError: there are no such files, one is missing or damaged, the index does not match them, or
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
    """The tensors of one file; the library checks that they fill it without holes or overlaps."""
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
    """The bytes of a tensor, `[size]`, uint8.

    Args:
        place: of the tensor.
    """
    return next(read_pieces(place, max(place.size, 1)))


def as_tensor(data: Tensor, place: Place) -> Tensor:
    """The tensor that some bytes represent.

    Args:
        data: `[size]`, uint8.
        place: of the tensor.

    Returns:
        A view `[*place.shape]` of the place's dtype.
    """
    return data.view(DTYPES[place.dtype]).reshape(place.shape)


def read_pieces(place: Place, piece: int = PIECE) -> Iterator[Tensor]:
    """The bytes of a tensor in pieces; a tensor without entries gives one empty piece.

    Args:
        place: of the tensor.
        piece: most bytes of a piece.

    Yields:
        `[bytes]`, uint8.

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
    """Where each tensor starts in a file's data; wide items come first, so that every tensor is aligned.

    Args:
        tensors: shape and dtype by name.

    >>> layout({"a": PartSpec((3,), torch.int8), "b": PartSpec((2,), torch.float32)})
    {'b': 0, 'a': 8}
    """
    starts, end = {}, 0
    for name in sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name)):
        starts[name] = end
        end += size_of(tensors[name])
    return starts


def size_of(spec: PartSpec) -> int:
    """Bytes of a tensor of this shape and dtype."""
    return spec.dtype.itemsize * torch.Size(spec.shape).numel()


def header_bytes(tensors: Mapping[str, PartSpec], metadata: Mapping[str, str]) -> bytes:
    """The bytes that precede the data in a safetensors file: the header's length, and the header.

    Args:
        tensors: shape and dtype by name.
        metadata: text for the header's `__metadata__`.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    for name, start in layout(tensors).items():
        shape, dtype = tensors[name]
        ends = [start, start + size_of(tensors[name])]
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": ends}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def readable(size: int) -> str:
    """A number of bytes in GB or MB.

    >>> readable(13_476_000_000), readable(90_900)
    ('13.48 GB', '0.1 MB')
    """
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
