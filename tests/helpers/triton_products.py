"""What tests of the Triton kernels share: grids, stored weights, and how far a product may be off.

The bounds are bounds and no guesses: all is exact but the sums in FP32 and one rounding of the result, for
which Triton's interpreter cuts bfloat16 off where a GPU rounds to the nearest.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from svdq_hf.format.decode import dense_blocks
from svdq_hf.format.parts import StoredWeight
from svdq_hf.kernels import reference

GRIDS: list[dict[str, Any]] = [
    {"group_size": 32, "levels": "normal", "column_scale": True, "scale_bits": 8},
    {"group_size": 64},
    {"group_size": 128, "scale_bits": 8},
    {"group_size": "row", "levels": "normal"},
    {"group_size": "tensor"},
    {"group_size": 16, "levels": "normal", "column_scale": True},
    {"group_size": 8, "scale_bits": 8},
    {"bits": 8},
    {"bits": 8, "group_size": "row", "column_scale": True},
    {"bits": 3, "group_size": "tensor"},
    {"bits": 3, "group_size": 32, "levels": "normal", "column_scale": True, "scale_bits": 8},
]
ROUNDED = {torch.float32: 0.0, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
"""Dtype -> how far one rounding, up or down, moves a number."""
FLOAT32 = 4e-7
"""What the sums in FP32 may be off, of the sum of their terms' sizes."""


def made(
    split: Callable[..., Any], out: int, in_features: int, k: int = 9, *, device: str, **grid: Any
) -> tuple[StoredWeight, int, int]:
    """A stored weight `[out, in]` of random numbers, its columns, and those that share a scale."""
    _, parts, scheme = split(out, in_features, k, device=device, **grid)
    return StoredWeight.of(parts), in_features, scheme.grid.columns(in_features)


def dense(stored: StoredWeight, in_features: int, group: int) -> Tensor:
    """The weight `[out, in]`, float32, by the reference."""
    return torch.cat([block.clone() for _, block in dense_blocks(stored.as_dict(), in_features, group)])


def assert_right(
    y: Tensor, x: Tensor, stored: StoredWeight, bias: Tensor | None, *numbers: int, more: float = 0.0
) -> None:
    """y is `x @ W.T + bias` but for the sum in FP32 and one rounding to its dtype, and more of each term."""
    wide = reference.linear(x.double(), stored, bias, *numbers)
    size = x.double().abs() @ dense(stored, *numbers).double().abs().T
    size += 0 if bias is None else bias.double().abs()
    allowed = (FLOAT32 + more) * size + ROUNDED[y.dtype] * wide.abs() + torch.finfo(y.dtype).smallest_normal
    assert y.dtype == x.dtype
    assert y.shape == wide.shape
    assert ((y.double() - wide).abs() <= allowed).all(), (y.double() - wide).abs().max()
