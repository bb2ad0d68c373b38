"""A safetensors file, opened; one that is truncated or damaged is named, for the library does not name it."""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

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
