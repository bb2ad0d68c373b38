"""Safetensors files of a folder: found and opened; a missing, truncated or damaged one is named in the error.

The library does not name the file that it cannot read. Torch is imported when a tensor is read, not to find a
file, so that a folder that is not there is told at once. Not here: the tensors' names
(`integrations.transformers.checkpoint_headers`), and reading bytes (`checkpoint.streaming.byte_ranges`).
"""

import errno
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError, safe_open

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
REPORT_FILE = "svdq_report.json"
"""What `svdq quantize` measured, beside the model."""
REMEDY = "download or copy the model again"
FOR_GGUF = "quantize one for llama.cpp with: svdq gguf F16.gguf OUT.gguf"


def open_tensors(file: str | Path) -> Any:
    """`safe_open` for torch; it reads only the header of the file.

    Args:
        file: its path.

    Raises:
        ValueError: the file is truncated or damaged; it is named.
        OSError: it is not there, or cannot be read.
    """
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{file}: truncated or damaged ({error}); {REMEDY}") from error


def weight_files(folder: str | Path) -> list[Path]:
    """The files that `from_pretrained` reads from a folder; with unusual names, all safetensors files.

    Args:
        folder: of a model.

    Raises:
        ValueError: it is no folder, has no such file, lacks one that the index names, or its index is
            damaged.
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
    """Refuse a path that is a file or does not exist.

    Args:
        folder: the path.

    Raises:
        ValueError: it says which of the two.
    """
    if Path(folder).suffix == ".gguf" and Path(folder).is_file():
        raise ValueError(f"{folder}: is a GGUF file, and folders are read here; {FOR_GGUF}")
    if Path(folder).is_file():
        raise ValueError(f"{folder}: is a file; name the folder of a model, with safetensors and config.json")
    if not Path(folder).is_dir():
        raise ValueError(f"{folder}: no such folder")


def read_index(file: Path) -> dict[str, str]:
    """The file of each tensor, as an index says.

    Args:
        file: path of the index.

    Returns:
        Name of the file by name of the tensor.

    Raises:
        ValueError: it is no such index, or names files elsewhere.
    """
    try:
        weights = json.loads(file.read_text())["weight_map"]
        found = {str(tensor): str(name) for tensor, name in weights.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file}: not an index of safetensors files ({error!r}); {REMEDY}") from error
    if not found:
        raise ValueError(f"{file}: its weight_map names no tensor; {REMEDY}")
    for name in found.values():
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{file}: names {name!r}, which is no safetensors file beside it; {REMEDY}")
    return found


def folder_bytes(folder: str | Path) -> int:
    """Bytes of the safetensors files that are read from a folder.

    Args:
        folder: of a model.

    Raises:
        ValueError: see `weight_files`.
    """
    return sum(file.stat().st_size for file in weight_files(folder))


def write_atomically(file: Path, text: str) -> None:
    """Write a text file so that a kill leaves the old file or the new one, never a part."""
    partial = file.with_suffix(".partial")
    with open(partial, "wb") as opened:
        opened.write(text.encode())
        _sync(opened)
    os.replace(partial, file)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


@contextmanager
def full_disk_named(folder: str | Path) -> Iterator[None]:
    """What is written in the block goes to a folder, which the error says where its disk is full.

    Args:
        folder: that is written, or the one that it lies in.

    Raises:
        OSError: the disk is full, the quota is used up, or a file would be larger than it may be.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = error.errno if isinstance(error, OSError) else _error_number(str(error))
        if number not in FULL:
            raise
        raise OSError(
            number,
            f"{os.strerror(number)}: the disk of {folder} cannot take what is written; make room there, or "
            "name a folder on another disk",
        ) from error


def _error_number(text: str) -> int | None:
    """The system's error number in a message of the safetensors library.

    >>> _error_number("I/O error: No space left on device (os error 28)")
    28
    """
    found = re.search(r"os error (\d+)", text)
    return None if found is None else int(found[1])


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a disk that takes no more."""
