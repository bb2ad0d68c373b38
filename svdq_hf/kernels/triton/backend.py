"""Triton backend: products on GPUs from the stored bytes; which calls it takes, and how they are computed.

CUDA and ROCm devices go by the same name in torch, XPU by its own. With `TRITON_INTERPRET=1`, set before
Python starts, the kernels run in NumPy on a CPU: for tests, and slow. Triton is imported when first needed.
Not here: the kernels (`kernels.triton.kernels`), their launches (`kernels.triton.launch`), the choice
(`kernels.backends`).
"""

import os
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Final

import torch
from torch import Tensor

from svdq_hf.format.parts import StoredWeight
from svdq_hf.kernels.positions import check_positions
from svdq_hf.kernels.triton.arguments import Window

DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)
OLDEST: Final = (8, 0)
"""CUDA's compute capability of Ampere, the first with products of bfloat16."""


def supports(x: Tensor, stored: StoredWeight, in_features: int, group: int) -> str | None:
    """None, or the reason why this backend does not compute a call.

    Args:
        x: activations `[..., in]`.
        stored: the weight `[out, in]`.
        in_features: its columns.
        group: columns that share a scale.
    """
    if x.dtype not in DTYPES:
        return f"activations are {x.dtype}, and it sums in float32"
    return refusal_of(x.device)


@cache
def refusal_of(device: torch.device) -> str | None:
    """None, or the reason why the kernels do not run on a device."""
    if device.type == "cpu":
        interpreted = is_here() and os.environ.get("TRITON_INTERPRET") == "1"
        return None if interpreted else "the tensors are on cpu, not on a GPU"
    if device.type not in ("cuda", "xpu"):
        return f"Triton has no kernels for {device.type}"
    if not is_here():
        return "Triton is not installed"
    if device.type == "cuda" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < OLDEST:
            return f"compute capability {capability[0]}.{capability[1]} has no products of bfloat16"
    return None


@cache
def is_here() -> bool:
    """Whether Triton is installed; it is not imported for that."""
    return find_spec("triton") is not None


def linear(
    x: Tensor, stored: StoredWeight, bias: Tensor | None, in_features: int, group: int, fast: bool = False
) -> Tensor:
    """`x @ W.T + bias`.

    Args:
        x: activations `[..., in]`.
        stored: the weight W `[out, in]`.
        bias: `[out]`, or None.
        in_features: columns of the weight.
        group: columns that share a scale.
        fast: no effect here.

    Returns:
        `[..., out]`, in the dtype of x.

    Raises:
        ValueError: a salient position is out of range or out of order.
    """
    check_positions(stored.salient_rows, stored.salient_columns, stored.out, in_features)
    tokens = x.reshape(-1, in_features).contiguous()
    if not tokens.shape[0]:
        return x.new_empty(*x.shape[:-1], stored.out)
    if tokens.shape[0] <= _launch().TILE_TOKENS:
        y = _launch().multiply(tokens, stored, bias, in_features, group)
    else:
        y = _by_dense_rows(tokens, stored, bias, in_features, group)
    found: Tensor = y.view(*x.shape[:-1], stored.out)
    return found


def _by_dense_rows(
    tokens: Tensor, stored: StoredWeight, bias: Tensor | None, in_features: int, group: int
) -> Tensor:
    """`tokens @ W.T + bias` by torch's own product with dense rows, rounded to the tokens' dtype."""
    y = tokens.new_empty(tokens.shape[0], stored.out)
    for window in _launch().windows(stored.out, in_features, by_rows=True):
        block = _launch().dense(stored, window, in_features, group, tokens.dtype)
        torch.mm(tokens, block.T, out=y[:, window.row : window.row + window.rows])
    if bias is not None:
        y += bias.to(y.dtype)
    return y


def input_gradient(gradient: Tensor, stored: StoredWeight, in_features: int, group: int) -> Tensor:
    """`gradient @ W`, dequantizing W again.

    Args:
        gradient: `[..., out]`.
        stored: the weight W `[out, in]`.
        in_features: its columns.
        group: columns that share a scale.

    Returns:
        `[..., in]`, in the dtype of gradient.

    Raises:
        ValueError: see `linear`.
    """
    check_positions(stored.salient_rows, stored.salient_columns, stored.out, in_features)
    tokens = gradient.reshape(-1, stored.out)
    total = gradient.new_empty(*gradient.shape[:-1], in_features)
    flat = total.view(-1, in_features)
    for window in _launch().windows(stored.out, in_features, by_rows=False):
        block = _launch().dense(stored, window, in_features, group, gradient.dtype)
        torch.mm(tokens, block, out=flat[:, window.column : window.column + window.columns])
    return total


def experts(x: Tensor, stored: StoredWeight, ends: Tensor, in_features: int, group: int) -> Tensor:
    """Each token times its expert's matrix, all experts in one launch.

    Args:
        x: tokens sorted by expert, `[n, in]`.
        stored: the stacked weights `[experts, out, in]`.
        ends: where each expert's tokens end, `[experts]`; on a GPU they are not looked at.
        in_features: columns of each weight.
        group: columns that share a scale.

    Returns:
        `[n, out]`, in the dtype of x; zero behind the last end.

    Raises:
        ValueError: see `linear`.
    """
    check_positions(stored.salient_rows, stored.salient_columns, stored.weight.shape[1], in_features)
    if not x.shape[0]:
        return x.new_zeros(0, stored.weight.shape[1])
    found: Tensor = _launch().multiply_experts(x.contiguous(), stored, ends, in_features, group)
    return found


def rows(ids: Tensor, stored: StoredWeight, in_features: int, group: int, dtype: torch.dtype) -> Tensor:
    """Rows of the weight by number; a number that is no row stops the device, as in torch's embedding.

    Args:
        ids: `[n]`, int64 or int32.
        stored: the weight `[rows, in]`.
        in_features: its columns.
        group: columns that share a scale.
        dtype: of the result.

    Returns:
        `[n, in]`.

    Raises:
        ValueError: see `linear`.
    """
    check_positions(stored.salient_rows, stored.salient_columns, stored.out, in_features)
    torch._assert_async(((ids >= 0) & (ids < stored.out)).all(), f"an id is not in 0..{stored.out - 1}")
    wanted = Window(0, ids.shape[0], 0, in_features)
    found: Tensor = _launch().dense(stored, wanted, in_features, group, dtype, ids.contiguous())
    return found


@cache
def _launch() -> ModuleType:
    """The launches, whose module imports Triton."""
    from svdq_hf.kernels.triton import launch

    return launch
