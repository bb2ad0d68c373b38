"""Binding of the native decoding of packed keys and values; plain torch where the library cannot.

Both give the same bits: `core.state_codes.decode` is the fallback and the oracle. Not here: which tokens are
packed (`nn.packed_states`), the sums themselves (states.c).
"""

import ctypes
from functools import cache
from typing import Final

import torch
from torch import Tensor

from svdq_hf.core.state_codes import GROUP, STEPS, StateFormat, decode
from svdq_hf.kernels.native.library import AVX2, best_path, library_with, parallel_of_torch

ABI: Final = 1
"""Version of states.c's interface."""

MOST_DIM: Final = 1024
"""Channels of a head that the library takes."""

WRITTEN: Final = {torch.float32: 0, torch.bfloat16: 1}
"""Dtypes that the library writes, and its numbers for them."""


class _States(ctypes.Structure):
    """Packed states and where their dense rows go: `States` of states.c."""

    _fields_ = (
        ("packed", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("heads", "tokens", "head_dim", "row_bytes", "packed_stride")),
        ("bits", ctypes.c_int64),
        ("channels", ctypes.c_void_p),
        ("own_heads", ctypes.c_int64),
        ("steps", ctypes.c_void_p),
        ("dense", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("kind", "dense_stride", "threads", "path")),
        ("parallel", ctypes.c_void_p),
    )


@cache
def decoding() -> ctypes.CDLL | None:
    """The native library, where it can decode states."""
    loaded = library_with("svdq_states_abi", ABI)
    if loaded is None:
        return None
    loaded.svdq_decode_states.argtypes = [ctypes.c_void_p]
    loaded.svdq_decode_states.restype = None
    return loaded


def decode_into(
    dense: Tensor, packed: Tensor, form: StateFormat, channels: Tensor | None, path: int | None = None
) -> None:
    """Decode packed states into the first tokens of a dense tensor, natively where that is possible.

    Args:
        dense: `[batch, heads, tokens or more, head_dim]`, contiguous; overwritten.
        packed: `[batch, heads, tokens, row_bytes]`, uint8.
        form: how they were packed.
        channels: the outlier channels `[heads, head_dim / 8]` of a form that has them, else None.
        path: one of the library's exact paths; None: the best.
    """
    tokens, head_dim = packed.shape[-2], dense.shape[-1]
    if _supports(dense, packed):
        _decode(dense, packed, form, channels, path)
    elif tokens:
        dense[:, :, :tokens] = decode(packed, head_dim, form, channels)


def _supports(dense: Tensor, packed: Tensor) -> bool:
    """Whether the library decodes these: on a CPU, in groups of 64, heads evenly apart."""
    head_dim = dense.shape[-1]
    return (
        dense.is_cpu
        and dense.dtype in WRITTEN
        and head_dim % GROUP == 0
        and head_dim <= MOST_DIM
        and packed.stride(-1) == 1
        and packed.stride(-2) == packed.shape[-1]
        and packed.stride(0) == packed.shape[1] * packed.stride(1)
        and decoding() is not None
    )


def _decode(
    dense: Tensor, packed: Tensor, form: StateFormat, channels: Tensor | None, path: int | None
) -> None:
    loaded = decoding()
    batch, heads, tokens, row_bytes = packed.shape
    chosen = None if channels is None else channels.to(torch.int32).contiguous()
    job = _States(
        packed.data_ptr(),
        batch * heads,
        tokens,
        dense.shape[-1],
        row_bytes,
        packed.stride(1),
        form.bits,
        None if chosen is None else chosen.data_ptr(),
        heads,
        STEPS.data_ptr(),
        dense.data_ptr(),
        WRITTEN[dense.dtype],
        dense.stride(1),
        torch.get_num_threads(),
        min(best_path() if path is None else path, AVX2),
        parallel_of_torch(),
    )
    if loaded is not None:
        loaded.svdq_decode_states(ctypes.byref(job))
