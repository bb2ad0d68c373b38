"""Launches of the Triton kernels: which one computes a call, in which grid, with which shapes.

Up to `FEW_TOKENS` tokens wait for memory and are multiplied without tensor cores; up to `TILE_TOKENS` are a
tile of tokens for tensor cores; for more, a block of dense rows is written and torch multiplies, as it would
for a dense layer. Where rows make too few programs for the device, the columns are split and the parts'
sums added by a second kernel, in a fixed order. Not here: which calls are taken (`kernels.triton.backend`).
"""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from svdq_hf.core.packing import BLOCK, bits_of
from svdq_hf.format.parts import StoredWeight
from svdq_hf.kernels.triton import kernels
from svdq_hf.kernels.triton.arguments import Plan, Salient, Sizes, Tokens, Weight, Window
from svdq_hf.kernels.triton.shapes import Shape, processors, shape_of

FEW_TOKENS: Final = 4
TILE_TOKENS: Final = 64
DENSE_WEIGHTS: Final = 1 << 26
"""Weights of a dense block: 128 MiB of bfloat16, which is every matrix of a 7B model but its head."""

INTERPRETED: Final = os.environ.get("TRITON_INTERPRET") == "1"
"""As Triton itself reads it when a kernel is defined: kernels run in NumPy, on tensors of the CPU."""

MOST_SPLITS: Final = 16


def multiply(
    x: Tensor,
    stored: StoredWeight,
    bias: Tensor | None,
    in_features: int,
    group: int,
    splits: int | None = None,
) -> Tensor:
    """`x @ W.T + bias` of a few tokens or a tile of them.

    Args:
        x: activations `[tokens, in]`, contiguous, 1 to `TILE_TOKENS` of them.
        stored: the weight W `[out, in]`.
        bias: `[out]`, or None.
        in_features: columns of the weight.
        group: columns that share a scale.
        splits: parts that the columns are cut into; None: as many as fill the device.

    Returns:
        `[tokens, out]`, in the dtype of x.
    """
    count, out = x.shape[0], stored.out
    few = count <= FEW_TOKENS
    shape = shape_of("few" if few else "tile", x.device)
    tiles = triton.cdiv(out, shape.rows)
    splits = splits or splits_for(tiles, in_features, shape, x.device)
    plan = plan_of(stored, in_features, group, shape)._replace(
        tokens=triton.next_power_of_2(count if few else max(count, 16)),
        splits=splits,
        terms=terms_of(x.dtype, stored),
    )
    weight, salient = pointers(stored, bias)
    sums = x.new_empty(splits, count, out, dtype=torch.float32) if splits > 1 else None
    io, sizes = (
        Tokens(x, x.new_empty(count, out), sums),
        Sizes(count, out, in_features, stored.salient_rows.numel()),
    )
    kernel = kernels.multiply_few if few else kernels.multiply_tile
    with on_device_of(x):
        kernel[(tiles, splits, 1)](io, weight, salient, sizes, plan, **how(shape))
        if splits > 1:
            kernels.add_splits[(tiles, 1, 1)](io, weight, salient, sizes, plan, **how(shape))
    return io.y  # type: ignore[no-any-return]


def multiply_experts(x: Tensor, stored: StoredWeight, ends: Tensor, in_features: int, group: int) -> Tensor:
    """Each token times its expert's matrix, in one launch, without a look at the data.

    Args:
        x: tokens sorted by expert, `[n, in]`, contiguous, n > 0.
        stored: the stacked weights `[experts, out, in]`.
        ends: where each expert's tokens end, `[experts]`; what is out of order or range is nobody's.
        in_features: columns of each weight.
        group: columns that share a scale.

    Returns:
        `[n, out]`, in the dtype of x; zero behind the last end.
    """
    (count, _), (experts, out) = x.shape, stored.weight.shape[:2]
    shape = shape_of("tile", x.device)
    each = min(TILE_TOKENS, max(16, triton.next_power_of_2(count // experts)))
    plan = plan_of(stored, in_features, group, shape)._replace(
        tokens=each, terms=terms_of(x.dtype, stored), experts=triton.next_power_of_2(experts)
    )
    weight, salient = pointers(stored, None)
    io = Tokens(x, x.new_zeros(count, out), None, ends.contiguous())
    sizes = Sizes(count, out, in_features, stored.salient_rows.shape[-1], experts)
    grid = (triton.cdiv(out, shape.rows), 1, min(count, count // each + experts))
    with on_device_of(x):
        kernels.multiply_tile[grid](io, weight, salient, sizes, plan, **how(shape))
    return io.y  # type: ignore[no-any-return]


def dense(
    stored: StoredWeight,
    window: Window,
    in_features: int,
    group: int,
    dtype: torch.dtype,
    ids: Tensor | None = None,
) -> Tensor:
    """A window of the weight as floats.

    Args:
        stored: the weight `[out, in]`.
        window: its rows and columns that are wanted; the first column is a multiple of 64.
        in_features: columns of the weight.
        group: columns that share a scale.
        dtype: of the result.
        ids: numbers of the rows that are wanted, `[rows]`, int64 or int32; None: the window's.

    Returns:
        `[rows, columns]`.
    """
    shape = shape_of("dequantize", stored.weight.device)
    if ids is not None:
        shape = shape._replace(rows=1)
    plan = plan_of(stored, in_features, group, shape)
    weight, salient = pointers(stored, None)
    result = torch.empty(window.rows, window.columns, dtype=dtype, device=stored.weight.device)
    grid = (triton.cdiv(window.rows, shape.rows), triton.cdiv(window.columns, BLOCK * shape.blocks))
    sizes = Sizes(window.rows, stored.out, in_features, stored.salient_rows.numel())
    if result.numel():
        with on_device_of(result):
            kernels.dequantize[grid](Tokens(ids, result), weight, salient, sizes, window, plan, **how(shape))
    return result


def windows(out: int, in_features: int, *, by_rows: bool) -> Iterator[Window]:
    """A weight `[out, in]` in blocks of rows or of columns, of at most `DENSE_WEIGHTS` where that can be."""
    if by_rows:
        step = max(1, DENSE_WEIGHTS // in_features)
        for row in range(0, out, step):
            yield Window(row, min(step, out - row), 0, in_features)
    else:
        step = max(1, DENSE_WEIGHTS // (out * BLOCK)) * BLOCK
        for column in range(0, in_features, step):
            yield Window(0, out, column, min(step, in_features - column))


def plan_of(stored: StoredWeight, in_features: int, group: int, shape: Shape) -> Plan:
    """What a kernel is compiled for: the layout of a weight `[out, in]` or of a stack, and a tile's shape."""
    scales = stored.weight_scale
    stacked = scales.ndim > 2
    bits = bits_of(stored.weight[0] if stacked else stored.weight)
    out = stored.weight.shape[1 if stacked else 0]
    return Plan(
        bits=bits,
        group=group if scales.shape[-1] > 1 else 0,
        single=scales.shape[-2] == 1 and out > 1,
        tokens=1,
        rows=shape.rows,
        blocks=shape.blocks,
        operand=tl.float32 if INTERPRETED else tl.bfloat16,  # NumPy has no bfloat16; the numbers are its
    )


def terms_of(dtype: torch.dtype, stored: StoredWeight) -> int:
    """Bfloat16 terms, of 8 bits each, that an activation times its column's scale is exactly the sum of.

    A bfloat16 number has 8 bits, a float16 one 11, FP32 24; a column's scale adds 8.
    """
    bits = {torch.bfloat16: 8, torch.float16: 11}.get(dtype, 24) + (
        8 if stored.column_scale is not None else 0
    )
    return min(3, -(-bits // 8))


def splits_for(tiles: int, in_features: int, shape: Shape, device: torch.device) -> int:
    """Parts of the columns, a power of two, that give the device's processors their programs."""
    steps = triton.cdiv(in_features, BLOCK * shape.blocks)
    wanted = min(shape.programs * processors(device) // tiles, steps, MOST_SPLITS)
    return int(triton.next_power_of_2(wanted + 1)) // 2 if wanted > 1 else 1


def pointers(stored: StoredWeight, bias: Tensor | None) -> tuple[Weight, Salient]:
    """The stored parts of one weight `[out, in]`, or of stacked ones, as the kernels take them."""
    codes, scale, *salient, row_scale, column_scale, levels = (
        None if part is None else part.contiguous() for part in stored
    )
    table = None if levels is None else words_of(levels)
    weight = Weight(codes, scale, row_scale, column_scale, table, None if bias is None else bias.contiguous())
    return weight, Salient(*salient) if stored.salient_rows.numel() else Salient()


def words_of(levels: Tensor) -> Tensor:
    """Levels `[..., 2**bits]`, int8, four in each int32."""
    aligned = levels if levels.storage_offset() % 4 == 0 else levels.clone()
    return aligned.view(torch.int32)


def how(shape: Shape) -> dict[str, Any]:
    """Triton's own options of a launch; products may be fused with sums, whatever its default is."""
    return {"num_warps": shape.warps, "num_stages": shape.stages, "enable_fp_fusion": True}


def on_device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Context manager for a launch on a tensor `[...]`, which Triton would put on the current device."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return nullcontext()
