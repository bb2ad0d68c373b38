"""The native library: found, loaded by ctypes, and given torch's own OpenMP to run on.

It is built with the package where there is a C compiler (setup.py) and is not linked to an OpenMP of its
own: two runtimes in one process are two pools of threads that fight. Where it is missing, everything runs
in plain torch. Not here: which calls it computes (`cpu`), the sums themselves (`svdq.c`).
"""

import ctypes
import logging
from collections.abc import Sequence
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from svdq_hf.packing import HALF, packed_width

logger = logging.getLogger(__name__)

ABI: Final = 1
"""What `svdq.c` says it is; another number is a library that was built from another source."""

PLAIN, AVX2, AVX512 = range(3)
"""Paths of the library, each better than the one before."""

_SCALES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
_ERRORS: dict[int, tuple[type[Exception], str]] = {
    1: (MemoryError, "no memory for a CPU kernel's panels"),
    2: (ValueError, "a salient position is out of range or out of order"),
    3: (ValueError, "a stored tensor does not start at a multiple of its dtype's size: clone() it"),
}


class Layer(ctypes.Structure):
    """A stored weight as the library sees it: `Layer` of svdq.c."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("out", "in", "group")),
        *((name, ctypes.c_void_p) for name in ("codes", "scale")),
        *((name, ctypes.c_int64) for name in ("scale_kind", "scale_rows", "groups")),
        *((name, ctypes.c_void_p) for name in ("row_scale", "column_scale", "levels")),
        *((name, ctypes.c_void_p) for name in ("values", "rows", "columns")),
        ("k", ctypes.c_int64),
        ("bias", ctypes.c_void_p),
    )


@cache
def library() -> ctypes.CDLL | None:
    """The library; None, and one line in the log, where it was not built or does not fit."""
    folder = Path(__file__).parent
    files = [file for suffix in EXTENSION_SUFFIXES for file in folder.glob(f"_svdq{suffix}")]
    why = "it was not built: a C compiler was missing"
    for file in files:
        try:
            loaded = ctypes.CDLL(str(file))
            found = loaded.svdq_abi()
        except (OSError, AttributeError) as error:
            why = f"{file.name} does not load: {error}"
            continue
        if found == ABI:
            return _prepared(loaded)
        why = f"{file.name} is of another release ({found}, not {ABI})"
    logger.warning(
        "svdq_hf runs without its native kernels (%s): quantized layers are several times slower on a CPU. "
        "With a C compiler, `pip install --force-reinstall --no-deps svdq_hf` builds them",
        why,
    )
    return None


def _prepared(loaded: ctypes.CDLL) -> ctypes.CDLL:
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    loaded.svdq_linear.argtypes = [pointer, pointer, pointer, number, number, number]
    loaded.svdq_dequantize.argtypes = [pointer, pointer, number, number, number, number]
    for name in ("svdq_linear", "svdq_dequantize", "svdq_cpu"):
        getattr(loaded, name).restype = number
    loaded.svdq_use_openmp.argtypes = [pointer]
    loaded.svdq_use_openmp.restype = None
    loaded.svdq_use_openmp(_parallel_of_torch())
    return loaded


def _parallel_of_torch() -> int | None:
    """Address of `GOMP_parallel` in the OpenMP that torch itself runs on; None: one thread."""
    for file in (Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*"):
        try:  # it is loaded already; looking a name up in it looks into what it depends on, too
            function = ctypes.CDLL(str(file)).GOMP_parallel
        except (OSError, AttributeError):
            continue
        return ctypes.cast(function, ctypes.c_void_p).value
    return None


@cache
def best_path() -> int:
    """The best path that this processor can run."""
    loaded = library()
    return int(loaded.svdq_cpu()) if loaded is not None else PLAIN


def fits(group: int, in_features: int) -> bool:
    """Whether the library decodes such groups: multiples of half a block, or a whole row."""
    return group % HALF == 0 or group >= in_features


def layer_of(stored: Sequence[Any], in_features: int, group: int, bias: Tensor | None = None) -> Layer:
    """The parts, in the order of `PARTS`, as the library sees them; the caller keeps the tensors alive.

    Raises:
        ValueError: a part whose size, dtype or memory layout is not the format's.
    """
    weight, scale, values, rows, columns, row_scale, column_scale, levels = stored
    out, k = weight.shape[0], values.numel()
    scale_kind, groups = _SCALES.get(scale.dtype), scale.shape[-1]
    right = (  # sizes rather than shapes: a pointer stays within what it points to, and it is quicker
        _is(weight, torch.int8, out * packed_width(in_features))
        and scale_kind is not None
        and tuple(scale.shape) in ((1, groups), (out, groups))
        and scale.is_contiguous()
        and scale.is_cpu
        and groups == -(-in_features // group)
        and _is(values, torch.float32, k)
        and _is(rows, torch.int32, k)
        and _is(columns, torch.int32, k)
        and (row_scale is None or _is(row_scale, torch.bfloat16, out))
        and (column_scale is None or _is(column_scale, torch.bfloat16, in_features))
        and (levels is None or _is(levels, torch.int8, 16))
        and (bias is None or _is(bias, torch.float32, out))
    )
    if not right:
        raise ValueError(f"the parts of a layer [{out}, {in_features}] are not what the format stores")
    return Layer(
        out,
        in_features,
        group,
        weight.data_ptr(),
        scale.data_ptr(),
        scale_kind,
        scale.shape[0],
        groups,
        None if row_scale is None else row_scale.data_ptr(),
        None if column_scale is None else column_scale.data_ptr(),
        None if levels is None else levels.data_ptr(),
        values.data_ptr(),
        rows.data_ptr(),
        columns.data_ptr(),
        k,
        None if bias is None else bias.data_ptr(),
    )


def multiply(layer: Layer, x: Tensor, y: Tensor, tokens: int, path: int) -> None:
    """`y = x W.T + bias`: x `[tokens, in]`, y `[tokens, out]`, float32 and contiguous.

    Raises:
        ValueError: a salient position is out of range.
    """
    call = _loaded().svdq_linear
    _raise(call(ctypes.byref(layer), x.data_ptr(), y.data_ptr(), tokens, torch.get_num_threads(), path))


def dequantize(layer: Layer, rows: slice, dense: Tensor, path: int) -> None:
    """Write the rows of W into `dense` `[rows, in]`, float32 and contiguous; it raises as `multiply` does."""
    call = _loaded().svdq_dequantize
    threads = torch.get_num_threads()
    _raise(call(ctypes.byref(layer), dense.data_ptr(), rows.start, rows.stop, threads, path))


def _loaded() -> ctypes.CDLL:
    loaded = library()
    if loaded is None:
        raise RuntimeError("the native library is not here; library() says why")
    return loaded


def _is(part: Tensor, dtype: torch.dtype, size: int) -> bool:
    return part.dtype is dtype and part.numel() == size and part.is_contiguous() and part.is_cpu


def _raise(code: int) -> None:
    if code:
        kind, why = _ERRORS[code]
        raise kind(why)
