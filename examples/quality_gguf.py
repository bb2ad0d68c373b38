"""GGUF's roundings by llama.cpp's own code, without an importance matrix, through llama-cpp-python's library.

As llama.cpp does, rows that a type's blocks do not divide take a larger type. Not here: which matrices of a
whole file take which type (Q4_K_M and its like); `bench_gguf.py` has llama.cpp write such files.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

FALLBACK = {"IQ4_XS": "IQ4_NL", "Q3_K": "IQ4_NL", "Q4_K": "Q5_0", "Q6_K": "Q8_0"}
"""Types in blocks of 256, and what llama.cpp takes instead (its blocks are of 32)."""


def by_llama_cpp(weight: Tensor, kind: str) -> tuple[int, Tensor]:
    """The bits of a weight `[out, in]`, float32, in a type of GGUF, and the weight they stand for."""
    rows, width = weight.shape
    if kind in FALLBACK and width % 256:
        kind = FALLBACK[kind]
    stored = (ctypes.c_char * (rows * _row_bytes(kind, width)))()
    library, dense, found = _library(), weight.contiguous(), torch.empty_like(weight)
    library.ggml_quantize_chunk(
        int(qtype(kind)), _pointer(dense), stored, *map(ctypes.c_int64, (0, rows, width)), None
    )
    name = kind.lower().replace("_k", "_K")
    getattr(library, f"dequantize_row_{name}")(stored, _pointer(found), ctypes.c_int64(weight.numel()))
    return 8 * len(stored), found


@cache
def _library() -> ctypes.CDLL:
    """The part of llama.cpp that knows its types; `LLAMA_CPP_LIB_PATH` as llama-cpp-python has it."""
    import llama_cpp

    home = os.environ.get("LLAMA_CPP_LIB_PATH", str(Path(llama_cpp.__file__).parent / "lib"))
    library = ctypes.CDLL(str(Path(home) / "libggml-base.so"))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    return library


def qtype(kind: str) -> GGMLQuantizationType:
    """A type by its name."""
    from gguf import GGMLQuantizationType

    return GGMLQuantizationType[kind]


def _row_bytes(kind: str, width: int) -> int:
    from gguf import GGML_QUANT_SIZES

    block, size = GGML_QUANT_SIZES[qtype(kind)]
    if width % block:
        raise ValueError(f"{kind} has blocks of {block}, which do not divide a width of {width}")
    return width // block * size


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())
