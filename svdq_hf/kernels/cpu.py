"""CPU backend: computes from the stored bytes for few tokens, from blocks of dense rows for many.

Few tokens wait for memory, so weights are decoded in registers and never written. Many tokens share the cost
of writing dense rows into cache first: the library's own bands, or blocks for torch's product (`way`).
Sums are float32, whatever the dtype of the activations; but on processors with AMX, many bfloat16 tokens are
multiplied with bfloat16 rows, as in a dense layer. Where the native library is missing, or a group is smaller
than it decodes, `supports` says so, and another backend computes (`kernels.reference`). Not here: the choice
(`kernels.backends`), loading the library (`kernels.native`).
"""

import threading
from collections.abc import Iterator
from functools import cache
from typing import Final

import torch
from torch import Tensor

from svdq_hf.core.packing import HALF, bits_of
from svdq_hf.format.parts import StoredWeight
from svdq_hf.kernels.native.library import (
    AVX512,
    PLAIN,
    READ,
    best_path,
    dequantize,
    fast_path,
    fits,
    layer_of,
    library,
    multiply,
)

FEW_TOKENS: Final = 16
"""More tokens use dense rows, where the library has no bands (no AVX2) or bfloat16 rows are faster."""

BAND_TOKENS: Final = 64
"""More tokens leave AVX2's bands for blocks of rows and torch's own product, whose blocking is better."""

FAST_COLUMNS: Final = 768
"""A row of fewer is exact also where fast is asked for: rounding the activations costs what it would gain."""

DECODED, ROWS, BFLOAT16_ROWS = range(3)
"""Ways to a product: weights decoded in registers, or blocks of dense rows, in float32 or bfloat16."""

BLOCK_WEIGHTS: Final = 1 << 20
"""Weights in a block of dense rows: four megabytes, which the cores' caches hold."""

DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)

_kept = threading.local()


def supports(x: Tensor, stored: StoredWeight, in_features: int, group: int) -> str | None:
    """None, or the reason why this backend does not compute a call.

    Args:
        x: activations `[..., in]`.
        stored: the weight `[out, in]`.
        in_features: its columns.
        group: columns that share a scale.
    """
    if not x.is_cpu:
        return f"the tensors are on {x.device.type}, not on a CPU"
    if x.dtype not in DTYPES:
        return f"activations are {x.dtype}, and it sums in float32"
    if not fits(group, in_features):
        return f"groups of {group} are no multiples of {HALF} columns, nor whole rows"
    return None if library() is not None else "the native library was not built, or does not load"


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
        fast: whether activations of few tokens may be rounded to 16 bits.

    Returns:
        `[..., out]`, in the dtype of x.

    Raises:
        ValueError: a salient position is out of range or out of order; a part is not contiguous.
    """
    return linear_on(chosen_path(fast, in_features), x, stored, bias, in_features, group)


def linear_on(
    path: int, x: Tensor, stored: StoredWeight, bias: Tensor | None, in_features: int, group: int
) -> Tensor:
    """`linear` on one path of the native library.

    Args:
        path: one of the library's paths.
        x: activations `[..., in]`.
        stored: the weight W `[out, in]`.
        bias: `[out]`, or None.
        in_features: columns of the weight.
        group: columns that share a scale.

    Returns:
        `[..., out]`, in the dtype of x.

    Raises:
        ValueError: see `linear`.
    """
    out, count = stored.out, x.numel() // in_features
    taken = way(count, x.dtype, path, has_amx(), bits_of(stored.weight))
    if taken == BFLOAT16_ROWS:
        return _by_blocks(path, x, stored, bias, in_features, group)
    reads = READ if taken == DECODED else (torch.float32,)
    tokens = (x if x.dtype in reads else x.float()).contiguous()
    if bias is not None and bias.dtype != torch.float32:
        bias = bias.float()
    if taken == DECODED:
        y = tokens.new_empty((*x.shape[:-1], out))
        multiply(layer_of(stored, in_features, group, bias), tokens, y, count, path)
    else:
        y = _by_blocks(path, tokens, stored, bias, in_features, group)
    return y if y.dtype == x.dtype else y.to(x.dtype)


def chosen_path(fast: bool, in_features: int) -> int:
    """The path of the native library for a layer: the fast one where it pays, or the best exact one.

    Args:
        fast: whether activations of few tokens may be rounded to 16 bits.
        in_features: columns of the weight.
    """
    return fast_path() if fast and in_features >= FAST_COLUMNS else best_path()


def _by_blocks(
    path: int, x: Tensor, stored: StoredWeight, bias: Tensor | None, in_features: int, group: int
) -> Tensor:
    """`linear` in the dtype of x, by torch's own product with a block of dense rows at a time."""
    y = x.new_empty((*x.shape[:-1], stored.out))
    tokens, flat = x.reshape(-1, in_features), y.view(-1, y.shape[-1])
    for rows, block in dense_blocks(stored, in_features, group, path):
        torch.mm(tokens, block.to(x.dtype).T, out=flat[:, rows])
    if bias is not None:
        y += bias.to(y.dtype)
    return y


def way(count: int, dtype: torch.dtype, path: int, amx: bool, bits: int = 4) -> int:
    """How tokens are multiplied: from decoded codes, or with blocks of dense rows.

    Args:
        count: number of tokens.
        dtype: of the activations.
        path: of the native library.
        amx: whether the processor has AMX.
        bits: of a code.

    Returns:
        `DECODED`, `ROWS` or `BFLOAT16_ROWS`.
    """
    if count <= FEW_TOKENS:
        return DECODED
    if amx and dtype == torch.bfloat16:
        return BFLOAT16_ROWS
    if path >= AVX512 and bits == 4:
        return DECODED
    return DECODED if path != PLAIN and count <= BAND_TOKENS else ROWS


@cache
def has_amx() -> bool:
    """Whether the processor multiplies bfloat16 in tiles, which is faster than any product in float32."""
    supported = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    return bool(supported())


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
    tokens = gradient.reshape(-1, gradient.shape[-1]).float()
    total = tokens.new_zeros(tokens.shape[0], in_features)
    for rows, block in dense_blocks(stored, in_features, group):
        total.addmm_(tokens[:, rows], block)
    return total.view(*gradient.shape[:-1], in_features).to(gradient.dtype)


def dense_blocks(
    stored: StoredWeight, in_features: int, group: int, path: int | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """The weight in blocks of rows.

    Args:
        stored: the weight `[out, in]`.
        in_features: its columns.
        group: columns that share a scale.
        path: of the native library; None: the best exact one.

    Yields:
        Rows, and the block `[rows, in]`, float32. All blocks share one buffer: a block is valid until the
        next one is taken.
    """
    layer = layer_of(stored, in_features, group)
    out = stored.out
    height = max(1, min(out, BLOCK_WEIGHTS // in_features))
    buffer = _buffer(height * in_features)
    for start in range(0, out, height):
        rows = slice(start, min(out, start + height))
        block = buffer[: (rows.stop - start) * in_features].view(-1, in_features)
        dequantize(layer, rows, block, best_path() if path is None else path)
        yield rows, block


def _buffer(size: int) -> Tensor:
    """A float32 buffer `[size]` of this thread, kept between calls: fresh pages take time."""
    kept: Tensor | None = getattr(_kept, "buffer", None)
    if kept is None or kept.numel() < size:
        kept = _kept.buffer = torch.empty(size, dtype=torch.float32, device="cpu")
    return kept
