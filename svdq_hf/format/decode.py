"""Decoding: stored parts -> the weight, whole or in blocks of rows; and selecting rows of stored parts.

Not here: the way there (`format.encode`), and columns or stacks of stored matrices (`format.slices`).
"""

from collections.abc import Iterator, Mapping
from itertools import pairwise

import torch
from torch import Tensor

from svdq_hf.core.packing import look_up_into, padded_width, unpack_into
from svdq_hf.core.rounding import expand, row_blocks, scale_of
from svdq_hf.format.parts import Scheme


def reconstruct(parts: Mapping[str, Tensor], in_features: int, scheme: Scheme) -> Tensor:
    """The weight that stored parts represent.

    Args:
        parts: stored parts of a weight `[out, in]`, by name (`part_specs`).
        in_features: its columns, which packed rows do not tell.
        scheme: how it is stored.

    Returns:
        `[out, in]`, float32.
    """
    packed = parts["weight"]
    dense = torch.empty(packed.shape[0], in_features, dtype=torch.float32, device=packed.device)
    for rows, block in dense_blocks(parts, in_features, scheme.grid.columns(in_features)):
        dense[rows] = block
    return dense


def take_rows(parts: Mapping[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    """The stored parts of a matrix made of some rows of a stored one; nothing is rounded again.

    Args:
        parts: stored parts of a weight `[out, in]`, by name (`part_specs`).
        rows: the rows wanted, `[n]`, in the order wanted; a row may occur twice.

    Returns:
        The stored parts of the matrix `[n, in]`.

    >>> from svdq_hf.format.encode import decompose
    >>> parts = decompose(torch.eye(4), *torch.empty(2, 0, dtype=torch.int32), Scheme(k=0))
    >>> reconstruct(take_rows(parts, torch.tensor([2, 2])), 4, Scheme(k=0)).argmax(1).tolist()
    [2, 2]
    """
    found = dict(parts)
    for name in ("weight", "row_scale", "weight_scale"):
        if name in parts and parts[name].shape[0] == parts["weight"].shape[0]:  # not a scale for all
            found[name] = parts[name].index_select(0, rows)  # which refuses a row below 0
    wanted, stored = rows.to(parts["salient_rows"].dtype), parts["salient_rows"].contiguous()
    starts = torch.searchsorted(stored, wanted)
    counts = torch.searchsorted(stored, wanted, right=True) - starts
    before = counts.cumsum(0) - counts
    entries = torch.arange(int(counts.sum()), device=rows.device) + (starts - before).repeat_interleave(
        counts
    )
    found["salient_values"] = parts["salient_values"][entries]
    found["salient_columns"] = parts["salient_columns"][entries]
    place = torch.arange(rows.shape[0], dtype=torch.int32, device=rows.device)
    found["salient_rows"] = place.repeat_interleave(counts)
    return found


def dense_blocks(parts: Mapping[str, Tensor], in_features: int, group: int) -> Iterator[tuple[slice, Tensor]]:
    """The weight in blocks of rows, so that a dense copy of all of it never exists on a CPU.

    Other devices take the whole weight as one block, which needs no look at the data (and so no
    synchronisation).

    Args:
        parts: stored parts of a weight `[out, in]`, by name (`part_specs`).
        in_features: its columns.
        group: columns that share a scale.

    Yields:
        Rows, and the block `[rows, in]`, float32. All blocks share one buffer: a block is valid until the
        next one is taken.
    """
    packed, scale = parts["weight"], parts["weight_scale"]
    levels, per_column = parts.get("levels"), parts.get("column_scale")
    out, padded = packed.shape[0], padded_width(packed)
    blocks = row_blocks(out, padded) if packed.device.type == "cpu" else [slice(0, out)]
    height = blocks[0].stop if blocks else 0
    buffer = torch.empty(height, padded, dtype=torch.float32, device=packed.device)
    flat = parts["salient_rows"].long() * padded + parts["salient_columns"]
    stretches = _stretches(parts["salient_rows"], blocks)
    for rows, entries in zip(blocks, stretches, strict=True):
        dense = buffer[: rows.stop - rows.start]
        if levels is None:
            unpack_into(packed[rows], dense)
        else:
            look_up_into(packed[rows], dense, levels)
        _multiply(dense, scale_of(rows, scale, parts.get("row_scale")), group, in_features)
        if per_column is not None:
            dense[:, :in_features].mul_(per_column.float())
        positions = flat[entries] - rows.start * padded
        dense.view(-1).index_add_(0, positions, parts["salient_values"][entries])
        yield rows, dense[:, :in_features]


def _stretches(salient_rows: Tensor, blocks: list[slice]) -> list[slice]:
    """The salient entries of each block: rows are sorted, so they are one slice."""
    if len(blocks) == 1:
        return [slice(None)]
    edges = torch.tensor([block.start for block in blocks[1:]], dtype=torch.int32, device=salient_rows.device)
    cuts = [0, *torch.searchsorted(salient_rows, edges).tolist(), salient_rows.numel()]
    return [slice(start, stop) for start, stop in pairwise(cuts)] if blocks else []


def _multiply(dense: Tensor, scale: Tensor, group: int, in_features: int) -> None:
    """Multiply `dense` `[rows, padded]` in place by its scales `[rows or 1, groups]`."""
    groups = scale.shape[1]
    if groups == 1:
        dense.mul_(scale)
    elif groups * group == dense.shape[1]:
        dense.view(dense.shape[0], groups, group).mul_(scale.unsqueeze(-1))
    else:  # the padding belongs to no group, or the last group goes beyond it
        dense[:, :in_features].mul_(expand(scale, group, in_features))
