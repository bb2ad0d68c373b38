"""Binding of the native library: found, loaded by ctypes, and given torch's own OpenMP to run on.

It is built with the package where there is a C compiler (pyproject.toml), not linked to an OpenMP of its
own: two runtimes in one process are two pools of threads that compete. Where it is missing, everything runs
in plain torch. Not here: which calls it computes (`kernels.cpu`), the sums themselves (svdq.c).
"""

import ctypes
import logging
from collections.abc import Callable
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from svdq_hf.core.packing import HALF, bits_of
from svdq_hf.core.release import how_to_install
from svdq_hf.format.parts import PARTS, StoredWeight

logger = logging.getLogger(__name__)

ABI: Final = 3
"""Version of svdq.c's interface; a library with another number was built from another source."""

PLAIN, AVX2, AVX512 = range(3)
"""Exact paths of the library, each faster than the one before; `fast_path` is a further, inexact one."""

READ: Final = (torch.float32, torch.bfloat16)
"""Dtypes of activations that the library reads and of results that it writes; it sums in float32."""

_SCALES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
_ERRORS: dict[int, tuple[type[Exception], str]] = {
    1: (MemoryError, "no memory for a CPU kernel's panels"),
    2: (ValueError, "a salient position is out of range or out of order"),
    3: (ValueError, "a stored tensor does not start at a multiple of its dtype's size: clone() it"),
}
_FOREIGN = 4


class NativeLayer(ctypes.Structure):
    """A stored weight in the library's memory layout: `Layer` of svdq.c."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("out", "in", "group", "bits")),
        *((name, ctypes.c_void_p) for name in ("codes", "scale")),
        *((name, ctypes.c_int64) for name in ("scale_kind", "scale_rows", "groups")),
        *((name, ctypes.c_void_p) for name in ("row_scale", "column_scale", "levels")),
        *((name, ctypes.c_void_p) for name in ("values", "rows", "columns")),
        ("k", ctypes.c_int64),
        ("bias", ctypes.c_void_p),
    )


class _Exchange(ctypes.Structure):
    """`DLPackExchangeAPI`; its fourth function gives access to a tensor without owning it."""

    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("older", ctypes.c_void_p),
        ("functions", ctypes.c_void_p * 5),
    )


@cache
def library() -> ctypes.CDLL | None:
    """The loaded library; None, and one warning in the log, where it was not built or does not fit."""
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


def library_with(version_of: str, abi: int) -> ctypes.CDLL | None:
    """The loaded library where it has a part of a version, else None: a library of an older release.

    Args:
        version_of: name of the function that tells the version of the part.
        abi: the version.
    """
    loaded = library()
    try:
        return loaded if loaded is not None and getattr(loaded, version_of)() == abi else None
    except AttributeError:  # it does not know the part
        return None


def _prepared(loaded: ctypes.CDLL) -> ctypes.CDLL:
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    loaded.svdq_linear.argtypes = [pointer, pointer, pointer, number, number, number, number]
    loaded.svdq_dequantize.argtypes = [pointer, pointer, number, number, number, number]
    for name in ("svdq_linear", "svdq_dequantize", "svdq_cpu", "svdq_fast"):
        getattr(loaded, name).restype = number
    loaded.svdq_use_openmp.argtypes = [pointer]
    loaded.svdq_use_openmp.restype = None
    loaded.svdq_use_openmp(parallel_of_torch())
    return loaded


@cache
def parallel_of_torch() -> int | None:
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
    """The path that rounds the activations of a few tokens to 16 bits, if the processor can run it.

    Its error relative to float64 is about 5e-5. On other processors it is the best exact path.
    """
    loaded = library()
    return int(loaded.svdq_fast()) if loaded is not None else PLAIN


@cache
def direct_call() -> Callable[..., int] | None:
    """`svdq_call`, which takes torch's tensors directly; None where torch lacks DLPack's C interface.

    It is called with the interpreter's lock, and releases it while it computes.
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
    """Address of torch's function that shows a tensor as a DLTensor (DLPack 1); None without one."""
    capsule = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if capsule is None:
        return None
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.argtypes, get.restype = [ctypes.py_object, ctypes.c_char_p], ctypes.c_void_p
    table = _Exchange.from_address(get(capsule, b"dlpack_exchange_api"))
    return table.functions[3] if table.major == 1 else None


def fits(group: int, in_features: int) -> bool:
    """Whether the library decodes groups of this size: multiples of half a block, or a whole row."""
    return group % HALF == 0 or group >= in_features


def layer_of(stored: StoredWeight, in_features: int, group: int, bias: Tensor | None = None) -> NativeLayer:
    """A stored weight and a bias as a C structure; the caller keeps the tensors alive.

    Sizes and dtypes must have passed `kernels.contract`.

    Args:
        stored: the weight `[out, in]`.
        in_features: its columns.
        group: columns that share a scale.
        bias: `[out]`, float32, or None.

    Raises:
        ValueError: a part is not contiguous.
    """
    for at, part in enumerate((*stored, bias)):
        if part is not None and not part.is_contiguous():
            name = (*PARTS, "bias")[at]
            raise ValueError(f"{name} is not what the format stores: it is strided; clone() it")
    weight, scale, values, rows, columns, row_scale, column_scale, levels = stored
    out, k = weight.shape[0], values.numel()
    scale_kind, groups = _SCALES[scale.dtype], scale.shape[1]
    return NativeLayer(
        out,
        in_features,
        group,
        bits_of(weight),
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
    """`y = x W.T + bias` through the library's direct call.

    Args:
        parts: the eight stored parts of W `[out, in]`, and the bias `[out]` or None.
        x: `[..., in]`, float32 or bfloat16 (`READ`), contiguous.
        y: the result, `[..., out]`, in the dtype of x, contiguous; overwritten.
        in_features: columns of the weight.
        group: columns that share a scale.
        path: one of the library's paths.

    Returns:
        False where the library does not support the arguments; nothing is written then.

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
    """`y = x W.T + bias`.

    Args:
        layer: the weight and the bias.
        x: `[tokens, in]`, float32 or bfloat16 (`READ`), contiguous.
        y: the result, `[tokens, out]`, in the dtype of x, contiguous; overwritten.
        tokens: how many.
        path: one of the library's paths.

    Raises:
        ValueError: a salient position is out of range or out of order.
    """
    call, narrow = _loaded().svdq_linear, x.dtype == torch.bfloat16
    threads = torch.get_num_threads()
    _raise(call(ctypes.byref(layer), x.data_ptr(), y.data_ptr(), narrow, tokens, threads, path))


def dequantize(layer: NativeLayer, rows: slice, dense: Tensor, path: int) -> None:
    """Write some rows of a weight.

    Args:
        layer: the weight.
        rows: which ones.
        dense: the result, `[rows, in]`, float32 and contiguous; overwritten.
        path: one of the library's paths.

    Raises:
        ValueError: see `multiply`.
    """
    call = _loaded().svdq_dequantize
    threads = torch.get_num_threads()
    _raise(call(ctypes.byref(layer), dense.data_ptr(), rows.start, rows.stop, threads, path))


def _loaded() -> ctypes.CDLL:
    loaded = library()
    if loaded is None:
        raise RuntimeError("the native library is not here; library() says why")
    return loaded


def _raise(code: int) -> None:
    if code:
        kind, why = _ERRORS[code]
        raise kind(why)
