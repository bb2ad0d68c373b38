"""Which safetensors files does a folder have? Opened, or named where one is missing, truncated or damaged.

The library does not name the file that it cannot read. Not here: what files hold (`loading`,
`streaming.files`).
"""

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
REMEDY = "download or copy the model again"


def open_tensors(file: str | Path) -> Any:
    """`safe_open` for torch; of the file, only the header is read now.

    Raises:
        ValueError: the file is truncated or damaged; it is named.
        OSError: it is not there, or cannot be read.
    """
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{file}: truncated or damaged ({error}); {REMEDY}") from error


def weight_files(folder: str | Path) -> list[Path]:
    """The files that `from_pretrained` reads from a folder; where their names are others, all that are there.

    Raises:
        ValueError: it is no folder, none is there, one that the index names is not, or the index is damaged.
    """
    check_is_folder(folder)
    told, folder = folder, Path(folder)
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        counts = Counter(read_index(folder / INDEX).values())
        for name, count in counts.items():
            if not (folder / name).is_file():
                raise ValueError(f"{told}: {name} is missing, {count} tensors are in it; {REMEDY}")
        return [folder / name for name in sorted(counts)]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{told}: no *.safetensors file is there")
    return files


def check_is_folder(folder: str | Path) -> None:
    """Refuse what is a file, or is not there.

    Raises:
        ValueError: it says which.
    """
    if Path(folder).is_file():
        raise ValueError(f"{folder}: is a file; name the folder of a model, with safetensors and config.json")
    if not Path(folder).is_dir():
        raise ValueError(f"{folder}: no such folder")


def read_index(file: Path) -> dict[str, str]:
    """Tensor -> name of its file, as an index says.

    Raises:
        ValueError: it is no such index, or names files elsewhere.
    """
    try:
        weights = json.loads(file.read_text())["weight_map"]
        found = {str(tensor): str(name) for tensor, name in weights.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file}: not an index of safetensors files ({error!r}); {REMEDY}") from error
    for name in found.values():
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{file}: names {name!r}, which is no safetensors file beside it; {REMEDY}")
    return found


def folder_bytes(folder: str | Path) -> int:
    """Bytes of the safetensors files that are read from a folder.

    Raises:
        ValueError: see `weight_files`.
    """
    return sum(file.stat().st_size for file in weight_files(folder))


DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
    "I64": torch.int64, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32,
    "F64": torch.float64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
"""Of the names that safetensors has for dtypes."""


def write_atomically(file: Path, text: str) -> None:
    """Write a file that is there as a whole or not at all."""
    partial = file.with_suffix(".partial")
    with open(partial, "wb") as opened:
        opened.write(text.encode())
        _sync(opened)
    os.replace(partial, file)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
