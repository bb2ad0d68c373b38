"""A GGUF file that is written: a header, another file's metadata byte by byte, and tensors in turn.

Copied and not parsed: a vocabulary may hold text that is not UTF-8, and keys of releases to come. The file
has a hidden name until it is complete. Source: docs/gguf.md of github.com/ggml-org/ggml. Not here: what the
tensors are (`integrations.gguf.quantize`).
"""

import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from svdq_hf.format.files import full_disk_named
from svdq_hf.integrations.gguf.model_file import MAGIC, ModelFile

VERSION = 3
ALIGNMENT = 32
UINT32, STRING = 4, 8
"""Types of a value in the metadata."""


class TensorPlan(NamedTuple):
    """A tensor to be written: its name, shape as torch counts it, number of ggml's type, and bytes."""

    name: str
    shape: tuple[int, ...]
    type: int
    bytes: int


def check_target(out: str | Path) -> None:
    """Refuse an output file before any work is done.

    Args:
        out: the file to write.

    Raises:
        ValueError: it is there already, or its folder is not.
    """
    target = Path(out)
    if os.path.lexists(target):
        raise ValueError(f"{out}: is there already; name another file or remove it")
    if not target.absolute().parent.is_dir():
        raise ValueError(f"{out}: no such folder: {target.absolute().parent}")


def write_file(
    out: str | Path,
    source: ModelFile,
    plans: Sequence[TensorPlan],
    data: Iterable[np.ndarray[Any, Any]],
    changes: dict[str, int | str],
) -> None:
    """Write a GGUF file; a failure leaves none.

    Args:
        out: the file.
        source: whose metadata it gets.
        plans: the tensors, in order.
        data: the bytes of each.
        changes: of the metadata: numbers (uint32) and texts by key.

    Raises:
        OSError: the file cannot be written.
    """
    target = Path(out).absolute()
    alignment = int(source.metadata("general.alignment", ALIGNMENT))
    with full_disk_named(target.parent), _hidden(target) as file:
        file.write(_header(source, plans, changes, alignment))
        for plan, part in zip(plans, data, strict=True):
            if part.nbytes != plan.bytes:
                raise ValueError(f"{plan.name}: {part.nbytes} bytes where {plan.bytes} were planned")
            file.write(b"\0" * (-file.tell() % alignment))
            file.write(np.ascontiguousarray(part).data)
        file.write(b"\0" * (-file.tell() % alignment))


@contextmanager
def _hidden(target: Path) -> Iterator[BinaryIO]:
    """A new file that gets its name at the end of the block, and is removed where the block fails."""
    hidden = target.with_name(f".{target.name}.unfinished")
    hidden.unlink(missing_ok=True)  # what a killed run has left
    try:
        with open(hidden, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(hidden, target)
    finally:
        hidden.unlink(missing_ok=True)


def _header(
    source: ModelFile, plans: Sequence[TensorPlan], changes: dict[str, int | str], alignment: int
) -> bytes:
    """Everything before the tensors' bytes."""
    kept = [field for name, field in source.reader.fields.items() if _is_stored(name) and name not in changes]
    entries = [_bytes_of(source, field) for field in kept]
    entries += [_entry(key, value) for key, value in changes.items()]
    told, offset = [], 0
    for plan in plans:
        told.append(_tensor_entry(plan, offset))
        offset += plan.bytes + -plan.bytes % alignment
    return MAGIC + struct.pack("<IQQ", VERSION, len(plans), len(entries)) + b"".join([*entries, *told])


def _is_stored(field: str) -> bool:
    """Whether a reader's field is a key of the file; its counts in the header are fields as well."""
    return not field.startswith("GGUF.")


def _bytes_of(source: ModelFile, field: Any) -> bytes:
    size = sum(part.nbytes for part in field.parts)
    return bytes(source.reader.data[field.offset : field.offset + size])


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _entry(key: str, value: int | str) -> bytes:
    if isinstance(value, str):
        return _text(key) + struct.pack("<I", STRING) + _text(value)
    return _text(key) + struct.pack("<II", UINT32, value)


def _tensor_entry(plan: TensorPlan, offset: int) -> bytes:
    dimensions = struct.pack(f"<{len(plan.shape)}Q", *reversed(plan.shape))
    return (
        _text(plan.name)
        + struct.pack("<I", len(plan.shape))
        + dimensions
        + struct.pack("<IQ", plan.type, offset)
    )
