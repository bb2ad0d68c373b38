"""Direct call of the native library, without torch's dispatcher, for plain inference on a CPU.

For a small layer, torch's dispatcher and its way back into Python take as long as the product. Where a call
needs nothing but the product (no gradient, no mode, no trace, no compiler), the library is called at once,
and checks every tensor itself. Everything else is left to the op (`kernels.linear_op`).
"""

from typing import Final

import torch
from torch import Tensor, nn
from torch._C import _get_tracing_state, _len_torch_dispatch_stack, _len_torch_function_stack
from torch._C._autograd import _profiler_enabled
from torch._C._functorch import peek_interpreter_stack

from svdq_hf.core.packing import bits_of
from svdq_hf.format.packed_codes import PackedCodes
from svdq_hf.format.parts import StoredWeight
from svdq_hf.kernels import cpu
from svdq_hf.kernels.native.library import READ, multiply_direct

_PLAIN: Final = frozenset((Tensor, nn.Parameter, PackedCodes, type(None)))


def linear(
    x: Tensor, stored: StoredWeight, bias: Tensor | None, in_features: int, group: int, fast: bool = False
) -> Tensor | None:
    """`x @ W.T + bias`, bit for bit as the op `svdq::linear` computes it.

    Args:
        x: activations `[..., in]`.
        stored: the weight W `[out, in]`.
        bias: `[out]`, or None.
        in_features: columns of the weight.
        group: columns that share a scale.
        fast: whether activations of few tokens may be rounded to 16 bits.

    Returns:
        `[..., out]`, in the dtype of x; None: the caller must use the op.

    Raises:
        ValueError: a salient position is out of range or out of order.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or _is_watched() or not _is_plain(x):
        return None
    path = cpu.chosen_path(fast, in_features)
    if not _is_decoded(x.numel() // in_features, x.dtype, path, stored.weight):
        return None
    if type(bias) not in _PLAIN or not _PLAIN.issuperset(map(type, stored)):
        return None
    tokens = x if x.dtype in READ else x.float()
    if bias is not None and bias.dtype not in READ:
        bias = bias.float()
    try:
        y = tokens.new_empty((*x.shape[:-1], stored.weight.shape[0]))
        done = multiply_direct((*stored, bias), tokens, y, in_features, group, path)
    except (BufferError, IndexError, RuntimeError):  # one of them has no data, no rows, or is elsewhere
        return None
    if not done:
        return None
    return y if tokens is x else y.to(x.dtype)


def _is_plain(x: Tensor) -> bool:
    """Whether x is a plain contiguous CPU tensor."""
    return type(x) is Tensor and x.dtype in cpu.DTYPES and x.is_cpu and x.is_contiguous() and not x.is_neg()


def _is_decoded(count: int, dtype: torch.dtype, path: int, weight: Tensor) -> bool:
    """Whether the library computes the product by itself; of a few tokens nothing else is looked at."""
    if count <= cpu.FEW_TOKENS:
        return True
    bits = bits_of(weight) if weight.ndim > 1 else 4  # a damaged one the op refuses
    return cpu.way(count, dtype, path, cpu.has_amx(), bits) == cpu.DECODED


def _is_watched() -> bool:
    """Whether a mode, a trace or a profiler must see the call of an operation."""
    return bool(
        torch.is_autocast_enabled("cpu")
        or _len_torch_dispatch_stack()
        or _len_torch_function_stack()
        or peek_interpreter_stack() is not None
        or _get_tracing_state() is not None
        or _profiler_enabled()
    )
