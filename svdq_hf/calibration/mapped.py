"""Matrices of zeros in a file that is mapped into memory: sums over a model that need no memory of their own.

A number for each weight in float32 is as large as the model. In a file the system writes it to disk when
memory is short, and the file is gone when its matrices are. Not here: what is summed up
(`quantize.rounding_lines`).
"""

import os
import tempfile
from collections.abc import Mapping
from math import prod
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor


def mapped_zeros(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Zeros in one temporary file, in the folder for such files (`TMPDIR`).

    Args:
        shapes: of the matrices, by name.

    Returns:
        A matrix `[out, in]` of its shape by each name, float32, on the CPU.

    Raises:
        OSError: the disk has no room for 4 bytes a number.

    >>> {name: zeros.tolist() for name, zeros in mapped_zeros({"a": (1, 2), "b": (1, 1)}).items()}
    {'a': [[0.0, 0.0]], 'b': [[0.0]]}
    """
    sizes = [prod(shape) for shape in shapes.values()]
    with tempfile.TemporaryFile() as file:
        _take_room(file, 4 * sum(sizes))
        numbers = torch.from_numpy(np.memmap(file, np.float32, "r+", shape=(sum(sizes),)))
    parts = zip(shapes.items(), torch.split(numbers, sizes), strict=True)
    return {name: part.view(shape) for (name, shape), part in parts}


def _take_room(file: IO[Any], size: int) -> None:
    """Make a file so large; a mapped page that finds no disk later would end the process."""
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            file.truncate(size)
    except OSError as error:
        folder, needed = tempfile.gettempdir(), f"{size / 1e9:.1f} GB"
        raise OSError(
            error.errno, f"{folder} has no room for {needed} of sums, a number for each weight: set TMPDIR"
        ) from error
