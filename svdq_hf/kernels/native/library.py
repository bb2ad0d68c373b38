"""The native library: found, loaded by ctypes, and given torch's own OpenMP to run on.

It is built with the package where there is a C compiler (pyproject.toml) and is not linked to an OpenMP of
its own: two runtimes in one process are two pools of threads that fight. Where it is missing, everything runs
in plain torch. Not here: which calls it computes (`cpu`), the sums themselves (`svdq.c`).
"""

import ctypes
import logging
from collections.abc import Callable, Sequence
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from svdq_hf.core.packing import HALF, packed_width
from svdq_hf.core.release import how_to_install

logger = logging.getLogger(__name__)

ABI: Final = 2
"""What `svdq.c` says it is; another number is a library that was built from another source."""

PLAIN, AVX2, AVX512 = range(3)
"""Paths of the library, each better than the one before; `fast_path` is a further one, which is not exact."""

_SCALES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
_ERRORS: dict[int, tuple[type[Exception], str]] = {
    1: (MemoryError, "no memory for a CPU kernel's panels"),
    2: (ValueError, "a salient position is out of range or out of order"),
    3: (ValueError, "a stored tensor does not start at a multiple of its dtype's size: clone() it"),
}
_FOREIGN = 4


class NativeLayer(ctypes.Structure):
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


class _Exchange(ctypes.Structure):
    """`DLPackExchangeAPI`, of which the fourth function shows a tensor without owning it."""

    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("older", ctypes.c_void_p),
        ("functions", ctypes.c_void_p * 5),
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
        "With a C compiler, %s builds them",
        why,
        how_to_install(),
    )
    return None


def _prepared(loaded: ctypes.CDLL) -> ctypes.CDLL:
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    loaded.svdq_linear.argtypes = [pointer, pointer, pointer, number, number, number]
    loaded.svdq_dequantize.argtypes = [pointer, pointer, number, number, number, number]
    for name in ("svdq_linear", "svdq_dequantize", "svdq_cpu", "svdq_fast"):
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
    """The best exact path that this processor can run."""
    loaded = library()
    return int(loaded.svdq_cpu()) if loaded is not None else PLAIN


@cache
def fast_path() -> int:
    """The path that rounds the activations of a few tokens to 16 bits, where the processor can run it.

    Relative to float64 it is off by some 5e-5. Elsewhere it is the best exact path.
    """
    loaded = library()
    return int(loaded.svdq_fast()) if loaded is not None else PLAIN


@cache
def direct_call() -> Callable[..., int] | None:
    """`svdq_call`, which takes tensors as they are; None where torch does not offer DLPack's C interface.

    It is called with the interpreter's lock, and lets it go while it computes.
    """
    look = _dltensor_from_py_object()
    if library() is None or look is None or not hasattr(ctypes, "pythonapi"):
        return None
    api = ctypes.pythonapi
    functions = (api.PyTuple_GetItem, api.PyEval_SaveThread, api.PyEval_RestoreThread)
    addresses = [id(None), look, *(ctypes.cast(each, ctypes.c_void_p).value for each in functions)]
    loaded = ctypes.PyDLL(_loaded()._name)
    loaded.svdq_use_python((ctypes.c_void_p * len(addresses))(*addresses))
    tensor, number = ctypes.py_object, ctypes.c_int64
    loaded.svdq_call.argtypes = [tensor, tensor, tensor, number, number, number, number]
    loaded.svdq_call.restype = number
    return loaded.svdq_call


def _dltensor_from_py_object() -> int | None:
    """Address of the function of torch that shows a tensor as a DLTensor, of DLPack 1."""
    capsule = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if capsule is None:
        return None
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.argtypes, get.restype = [ctypes.py_object, ctypes.c_char_p], ctypes.c_void_p
    table = _Exchange.from_address(get(capsule, b"dlpack_exchange_api"))
    return table.functions[3] if table.major == 1 else None


def fits(group: int, in_features: int) -> bool:
    """Whether the library decodes such groups: multiples of half a block, or a whole row."""
    return group % HALF == 0 or group >= in_features


def layer_of(stored: Sequence[Any], in_features: int, group: int, bias: Tensor | None = None) -> NativeLayer:
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
    return NativeLayer(
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


def multiply_direct(
    parts: tuple[Tensor | None, ...], x: Tensor, y: Tensor, in_features: int, group: int, path: int
) -> bool:
    """`multiply` of nine tensors, the parts and the bias; False: not what the library takes, nothing done.

    Raises:
        ValueError: see `multiply`.
    """
    call = direct_call()
    if call is None:
        return False
    code = call(parts, x, y, in_features, group, torch.get_num_threads(), path)
    if code == _FOREIGN:
        return False
    _raise(code)
    return True


def multiply(layer: NativeLayer, x: Tensor, y: Tensor, tokens: int, path: int) -> None:
    """`y = x W.T + bias`: x `[tokens, in]`, y `[tokens, out]`, float32 and contiguous.

    Raises:
        ValueError: a salient position is out of range.
    """
    call = _loaded().svdq_linear
    _raise(call(ctypes.byref(layer), x.data_ptr(), y.data_ptr(), tokens, torch.get_num_threads(), path))


def dequantize(layer: NativeLayer, rows: slice, dense: Tensor, path: int) -> None:
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
