"""Checks of stored parts: whether they are what `format.encode` writes, for files from anybody.

Not here: the shapes themselves (`format.parts`), and files that cannot be opened (`format.files`).
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from svdq_hf.core.packing import RANGES, bits_of, padded_width, unpack_into
from svdq_hf.core.rounding import row_blocks
from svdq_hf.format.parts import Scheme, part_specs
from svdq_hf.format.subspace import halves


def check_parts(parts: Mapping[str, Tensor], in_features: int, scheme: Scheme) -> None:
    """Refuse parts that `encode` would not write.

    Args:
        parts: stored parts of a weight `[out, in]`, by name (`part_specs`).
        in_features: its columns.
        scheme: how the config says it is stored.

    Raises:
        ValueError: a part is missing; a shape or dtype is not that of `part_specs`; a scale or a
            salient value is NaN or infinite; code zero is not level zero; a position is out of range,
            out of order or there twice; the code at a salient position or in the padding is not zero;
            a code of 8 bits is -128.
    """
    packed = parts.get("weight")
    out = packed.shape[0] if packed is not None and packed.ndim > 0 else 0
    for name, spec in part_specs(out, in_features, scheme).items():
        part = parts.get(name)
        if part is None:
            raise ValueError(f"{name} is missing")
        if (tuple(part.shape), part.dtype) != spec:
            raise ValueError(
                f"{name} is {list(part.shape)} {part.dtype}, "
                f"where the config says {list(spec.shape)} {spec.dtype}"
            )
    if scheme.activations is None:
        _check_values(parts, in_features, scheme)
        return
    outside, *inside = halves(parts, in_features, scheme)
    _check_values(outside.parts, outside.columns, outside.scheme)
    for half in inside:
        try:
            _check_values(half.parts, half.columns, half.scheme)
        except ValueError as error:
            raise ValueError(f"in the subspace, {error}") from error


def _check_values(parts: Mapping[str, Tensor], in_features: int, scheme: Scheme) -> None:
    """Refuse values that `encode` would not write, in parts of the right shapes."""
    check_range(parts)
    zero = -RANGES[scheme.grid.bits][0]
    if "levels" in parts and parts["levels"][zero] != 0:
        raise ValueError(f"levels has {int(parts['levels'][zero])} for code zero, which must be 0")
    _check_positions(parts["weight"], parts["salient_rows"], parts["salient_columns"], in_features)


def check_range(parts: Mapping[str, Tensor]) -> None:
    """Refuse scales and salient values that are not finite, or whose product with a code could overflow.

    Args:
        parts: stored parts of a weight `[out, in]`, by name (`part_specs`).

    Raises:
        ValueError: a NaN or an infinity, or a product of scales that is more than a float32 can hold.
    """
    for name in ("weight_scale", "salient_values", "row_scale", "column_scale"):
        if name in parts and parts[name].is_floating_point() and not torch.isfinite(parts[name]).all():
            raise ValueError(f"{name} has a NaN or an infinity")
    if not math.isfinite(_largest(parts)):
        raise ValueError("the product of the scales is more than a float32 can hold")


def _largest(parts: Mapping[str, Tensor]) -> float:
    """An upper bound of the low-bit part's weights, as float32 multiplies them."""
    bound = torch.tensor(float(-RANGES[bits_of(parts["weight"])][0]), device="cpu")  # not a context's
    for name in ("levels", "weight_scale", "row_scale", "column_scale"):
        if name in parts and parts[name].numel():
            ends = torch.stack(torch.aminmax(parts[name]))  # no copy of them all
            bound = bound * ends.float().abs().max().cpu()
    return float(bound)


def _check_positions(packed: Tensor, rows: Tensor, columns: Tensor, in_features: int) -> None:
    out = packed.shape[0]
    for name, index, size in (
        ("salient_rows", rows, out),
        ("salient_columns", columns, in_features),
    ):
        wrong = index[(index < 0) | (index >= size)]
        if wrong.numel():
            raise ValueError(f"{name} has {int(wrong[0])}, which is not in 0..{size - 1}")
    order = rows.long() * in_features + columns.long()
    if (order[1:] <= order[:-1]).any():
        raise ValueError("salient positions are out of order, or one is there twice")
    width, lowest = padded_width(packed), RANGES[bits_of(packed)][0]
    for block in row_blocks(out, width):
        codes = torch.empty(block.stop - block.start, width, dtype=torch.int8, device=packed.device)
        unpack_into(packed[block], codes)
        inside = (rows >= block.start) & (rows < block.stop)
        if codes[rows[inside].long() - block.start, columns[inside].long()].any():
            raise ValueError("weight has a code that is not zero at a salient position")
        if codes[:, in_features:].any():
            raise ValueError("weight has a code that is not zero in its padding")
        if bits_of(packed) == 8 and (codes < lowest).any():  # a byte can say more than a code
            raise ValueError(f"weight has the code {lowest - 1}, where codes of 8 bits are {lowest} and more")
