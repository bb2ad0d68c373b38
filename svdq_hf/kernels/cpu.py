"""The op on a CPU: from the stored bytes where tokens are few, a block of rows at a time where they are many.

Few tokens wait for memory, so the 4-bit weights are decoded in registers and never written. Many tokens
share the cost of writing dense rows into cache first. Either way sums are float32, whatever the dtype of the
activations; but where the processor has AMX, many bfloat16 tokens meet bfloat16 rows, as in a dense layer.
Where the native library is missing, a group is smaller than it decodes, or codes are not of 4 bits,
`reference` computes.
"""

import threading
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor

from svdq_hf.core.packing import bits_of
from svdq_hf.kernels.native.library import (
    AVX512,
    best_path,
    dequantize,
    fast_path,
    fits,
    layer_of,
    library,
    multiply,
)

FEW_TOKENS: Final = 16
"""Where tokens have no panels (no AVX-512) or want bfloat16 rows: more than these take dense rows instead."""

DECODED, ROWS, BFLOAT16_ROWS = range(3)
"""Ways to a product: weights decoded in registers, or blocks of dense rows, in float32 or bfloat16."""

BLOCK_WEIGHTS: Final = 1 << 20
"""Weights of a block of dense rows: four megabytes, which a core's cache and its neighbours' hold."""

_kept = threading.local()


DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)


def computes(x: Tensor, weight: Tensor, in_features: int, group: int) -> bool:
    """Whether this file computes the op for such activations, packed codes and groups."""
    known = x.dtype in DTYPES and bits_of(weight) == 4 and fits(group, in_features)
    return x.is_cpu and known and library() is not None


def linear(
    x: Tensor,
    stored: Sequence[Any],
    bias: Tensor | None,
    in_features: int,
    group: int,
    path: int | None = None,
    fast: bool = False,
) -> Tensor:
    """`x @ W.T + bias`: x `[..., in]` -> `[..., out]`; stored: the parts, in the order of `PARTS`.

    path: of the native library; None: the best, or with `fast` the one that rounds few tokens to 16 bits.

    Raises:
        ValueError: parts that are not the format's.
    """
    path = chosen_path(fast) if path is None else path
    out, count = stored[0].shape[0], x.numel() // in_features
    taken = way(count, x.dtype, path, has_amx())
    if taken == BFLOAT16_ROWS:
        return _by_blocks(x, stored, bias, in_features, group, path)
    tokens = x
    if x.dtype != torch.float32 or not x.is_contiguous():
        tokens = x.float().contiguous()
    if bias is not None and bias.dtype != torch.float32:
        bias = bias.float()
    if taken == DECODED:
        y = tokens.new_empty((*x.shape[:-1], out))
        multiply(layer_of(stored, in_features, group, bias), tokens, y, count, path)
    else:
        y = _by_blocks(tokens, stored, bias, in_features, group, path)
    return y if y.dtype == x.dtype else y.to(x.dtype)


def chosen_path(fast: bool) -> int:
    """The path of the native library for a layer."""
    return fast_path() if fast else best_path()


def _by_blocks(
    x: Tensor, stored: Sequence[Any], bias: Tensor | None, in_features: int, group: int, path: int
) -> Tensor:
    """`linear` in the dtype of x, by torch's own product with a block of dense rows at a time."""
    y = x.new_empty((*x.shape[:-1], stored[0].shape[0]))
    tokens, flat = x.reshape(-1, in_features), y.view(-1, y.shape[-1])
    for rows, block in dense_blocks(stored, in_features, group, path):
        torch.mm(tokens, block.to(x.dtype).T, out=flat[:, rows])
    if bias is not None:
        y += bias.to(y.dtype)
    return y


def way(count: int, dtype: torch.dtype, path: int, amx: bool) -> int:
    """How so many tokens of a dtype meet the weights, on a path, by a processor with or without AMX."""
    if count <= FEW_TOKENS:
        return DECODED
    if amx and dtype == torch.bfloat16:
        return BFLOAT16_ROWS
    return DECODED if path >= AVX512 else ROWS


@cache
def has_amx() -> bool:
    """Whether the processor multiplies bfloat16 in tiles: torch's product then beats any in float32."""
    supported = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    return bool(supported())


def input_gradient(gradient: Tensor, stored: Sequence[Any], in_features: int, group: int) -> Tensor:
    """`gradient @ W`: gradient `[..., out]` -> `[..., in]`, dequantizing again."""
    tokens = gradient.reshape(-1, gradient.shape[-1]).float()
    total = tokens.new_zeros(tokens.shape[0], in_features)
    for rows, block in dense_blocks(stored, in_features, group):
        total.addmm_(tokens[:, rows], block)
    return total.view(*gradient.shape[:-1], in_features).to(gradient.dtype)


def dense_blocks(
    stored: Sequence[Any], in_features: int, group: int, path: int | None = None
) -> Iterator[tuple[slice, Tensor]]:
    """The weight in blocks of rows: `(rows, block [rows, in])`, float32, in one buffer used again."""
    layer = layer_of(stored, in_features, group)
    out = stored[0].shape[0]
    height = max(1, min(out, BLOCK_WEIGHTS // in_features))
    buffer = _buffer(height * in_features)
    for start in range(0, out, height):
        rows = slice(start, min(out, start + height))
        block = buffer[: (rows.stop - start) * in_features].view(-1, in_features)
        dequantize(layer, rows, block, best_path() if path is None else path)
        yield rows, block


def _buffer(size: int) -> Tensor:
    """A thread's own float32 `[size]`, kept between calls: fresh pages cost as much as what is written."""
    kept: Tensor | None = getattr(_kept, "buffer", None)
    if kept is None or kept.numel() < size:
        kept = _kept.buffer = torch.empty(size, dtype=torch.float32, device="cpu")
    return kept
