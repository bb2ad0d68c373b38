"""Binding of the native quantizing: a weight to its stored bytes in one pass, and its column scale.

What it computes is what `format.encode` computes in plain torch, which stays the fallback and the oracle:
fewer than one code in 10,000 differs, since sums run in another order. Each path of the library and each
number of threads gives the same bytes. Not here: the choice between the two (`quantize.weight`), the sums
themselves (quantize.c).
"""

import ctypes
from functools import cache
from typing import Final, NamedTuple

import torch
from torch import Tensor

from svdq_hf.core.column_scale import COLUMN_ROUNDS
from svdq_hf.core.grid import Grid
from svdq_hf.core.packing import packed_shape
from svdq_hf.core.scales import LEAST_CLIP, SIZES
from svdq_hf.kernels.native.library import AVX2, best_path, library_with, parallel_of_torch

ABI: Final = 1
"""Version of quantize.c's interface."""

KINDS: Final = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Dtypes of a dense weight that the library reads, and its numbers for them."""

CPU = torch.device("cpu")
"""Said at every new tensor: a loader may have made another device the default."""

_SCALE_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
_RULES = {"mse": 0, "absmax": 1, "sigma": 2}
_ERRORS: dict[int, tuple[type[Exception], str]] = {
    1: (MemoryError, "no memory for a block of rows"),
    2: (ValueError, "a salient position is out of range or out of order"),
}


class _Source(ctypes.Structure):
    """A dense weight, and who reads it: `Source` of dense.h."""

    _fields_ = (
        ("weight", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("kind", "out", "in", "threads", "path")),
        ("parallel", ctypes.c_void_p),
    )


class _Rounding(ctypes.Structure):
    """A weight, how it is rounded, and where its parts go: `Rounding` of quantize.c."""

    _fields_ = (
        ("source", _Source),
        *((name, ctypes.c_int64) for name in ("group", "bits")),
        ("levels", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("rule", "sizes")),
        *((name, ctypes.c_double) for name in ("least_clip", "clip_sigma", "top")),
        *((name, ctypes.c_void_p) for name in ("column_scale", "rows", "columns")),
        *((name, ctypes.c_int64) for name in ("k", "scale_kind")),
        *((name, ctypes.c_void_p) for name in ("codes", "scale", "row_scale", "lost")),
    )


class Rounded(NamedTuple):
    """A rounded weight `[out, in]` in the stored format.

    Attributes:
        packed: codes, `[out, *packed_shape]`, int8.
        scale: of `Grid.scale_shape` and `Grid.scale_dtype`.
        row_scale: `[out]`, bfloat16; None where the grid has none.
        relative_error: `|weight - stored| / |weight|` in the Frobenius norm.
    """

    packed: Tensor
    scale: Tensor
    row_scale: Tensor | None
    relative_error: float


@cache
def quantizing() -> ctypes.CDLL | None:
    """The native library, where it can quantize."""
    loaded = library_with("svdq_quantize_abi", ABI)
    if loaded is None:
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    loaded.svdq_quantize.argtypes = loaded.svdq_largest.argtypes = [pointer]
    loaded.svdq_column_scale.argtypes = [pointer, ctypes.c_double, number, pointer]
    for name in ("svdq_quantize", "svdq_largest", "svdq_column_scale"):
        getattr(loaded, name).restype = number
    return loaded


def reads(weight: Tensor) -> str | None:
    """None, or the reason why the library does not read a weight `[out, in]`."""
    if not weight.is_cpu:
        return f"the weight is on {weight.device.type}, not on a CPU"
    if weight.dtype not in KINDS or not weight.is_contiguous():
        return f"the weight is {weight.dtype}{'' if weight.is_contiguous() else ', and strided'}"
    return None if quantizing() is not None else "the native library was not built, or does not load"


def supports(weight: Tensor, grid: Grid) -> str | None:
    """None, or the reason why the library does not round a weight.

    Args:
        weight: `[out, in]`.
        grid: what it is rounded on.
    """
    if grid.group_size == "tensor":
        return "one scale for a whole matrix is fitted to all of it at once"
    if grid.scale not in _RULES:
        return f"the scale rule {grid.scale!r} is in torch alone"
    return reads(weight)


def largest(weight: Tensor, path: int | None = None) -> float:
    """The largest size of a weight; infinity or NaN where it has one. Only where `reads` says None.

    Args:
        weight: `[out, in]`, contiguous.
        path: one of the library's exact paths; None: the best.
    """
    bits = _loaded().svdq_largest(ctypes.byref(_source(weight, path)))
    words = torch.int32 if weight.dtype == torch.float32 else torch.int16
    return float(torch.tensor([bits], dtype=words, device=CPU).view(weight.dtype))


def column_scale(weight: Tensor, top: float, path: int | None = None) -> Tensor:
    """`core.column_scale.column_scale`, in one reading for each round. Only where `reads` says None.

    Args:
        weight: `[out, in]`, contiguous; finite.
        top: the largest size of a weight.
        path: one of the library's exact paths; None: the best.

    Returns:
        `[in]`, bfloat16.
    """
    found = torch.empty(weight.shape[1], dtype=torch.bfloat16, device=CPU)
    source = _source(weight, path)
    _raise(_loaded().svdq_column_scale(ctypes.byref(source), top or 1.0, COLUMN_ROUNDS, found.data_ptr()))
    return found


def round_weight(
    weight: Tensor,
    grid: Grid,
    column_scale: Tensor | None,
    positions: tuple[Tensor, Tensor],
    top: float,
    path: int | None = None,
) -> Rounded:
    """Round a weight to the nearest levels and pack it; what `supports` refuses must not be given.

    Args:
        weight: `[out, in]`, contiguous; finite.
        grid: layout of the scales, levels, and the rule that fits.
        column_scale: `[in]`, bfloat16, or None.
        positions: rows and columns of the salient entries, `[k]` each, int32, sorted.
        top: the largest size of a weight.
        path: one of the library's exact paths; None: the best.

    Returns:
        The parts, and the relative error.

    Raises:
        ValueError: a salient position is out of range or out of order.
    """
    out, in_features = weight.shape
    packed = torch.empty(out, *packed_shape(in_features, grid.bits), dtype=torch.int8, device=CPU)
    scale = torch.empty(grid.scale_shape(out, in_features), dtype=grid.scale_dtype, device=CPU)
    row_scale = torch.empty(out, dtype=torch.bfloat16, device=CPU) if grid.row_scale else None
    levels = None if grid.levels == "linear" else torch.tensor(grid.table, dtype=torch.int8, device=CPU)
    lost = torch.zeros(2, dtype=torch.float64, device=CPU)
    rows, columns = (index.contiguous() for index in positions)
    job = _Rounding(
        _source(weight, path),
        grid.columns(in_features),
        grid.bits,
        _address(levels),
        _RULES[grid.scale],
        SIZES[grid.levels],
        LEAST_CLIP[grid.bits],
        grid.clip_sigma,
        top or 1.0,
        _address(column_scale),
        rows.data_ptr(),
        columns.data_ptr(),
        rows.numel(),
        _SCALE_KINDS[scale.dtype],
        packed.data_ptr(),
        scale.data_ptr(),
        _address(row_scale),
        lost.data_ptr(),
    )
    _raise(_loaded().svdq_quantize(ctypes.byref(job)))
    error, total = lost.tolist()
    return Rounded(packed, scale, row_scale, (error / total) ** 0.5 if total else 0.0)


def _source(weight: Tensor, path: int | None) -> _Source:
    chosen = min(best_path() if path is None else path, AVX2)
    kind, threads = KINDS[weight.dtype], torch.get_num_threads()
    return _Source(weight.data_ptr(), kind, *weight.shape, threads, chosen, parallel_of_torch())


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _loaded() -> ctypes.CDLL:
    loaded = quantizing()
    if loaded is None:
        raise RuntimeError("the native library is not here; reads() says why")
    return loaded


def _raise(code: int) -> None:
    if code:
        kind, why = _ERRORS[code]
        raise kind(why)
