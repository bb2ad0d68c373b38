"""Check of salient positions: each in range, rows sorted.

A column beyond the last would change the next row in a kernel that adds salient weights into dense rows, and
unsorted rows would be missed by one that searches a block's entries. Files are checked when they are read,
but a state dict, or a user, can put anything into a module. The C library checks each position when it uses
it; the other backends check here. A few positions on a CPU are checked each time. Checking many of them would
take a quarter of a small layer's time, and on a GPU a check waits for the device: those are checked once for
each version of the two tensors. So a change that torch does not count (by `.data` or NumPy, after a call) is
missed. While a CUDA graph is captured nothing may wait, and nothing is checked: a call before did it.
"""

from typing import Final, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

EACH_TIME: Final = 64
"""Positions on a CPU that are looked at each time, in three microseconds; more are remembered."""

REMEMBERED: Final = 1 << 16
"""Most weights that are remembered."""


class _Seen(NamedTuple):
    """Memory of positions that were found good: weak references, lest a reused address count."""

    rows: StorageWeakRef
    columns: StorageWeakRef


_seen: dict[tuple[int, ...], _Seen] = {}


def check_positions(rows: Tensor, columns: Tensor, out: int, in_features: int) -> None:
    """Refuse salient positions outside a matrix `[out, in]`, or rows that are not sorted.

    Args:
        rows: `[k]`, int32; of stacked matrices `[experts, k]`.
        columns: of that shape, int32.
        out: rows of the matrix.
        in_features: columns of the matrix.

    Raises:
        ValueError: it names the tensor and the position.
    """
    if not rows.numel() or rows.is_meta or is_capturing(rows):
        return
    if rows.is_cpu and rows.numel() <= EACH_TIME and rows.ndim == 1:
        if not _are_few_and_good(rows.tolist(), columns.tolist(), out, in_features):
            refuse_wrong(rows, columns, out, in_features)
        return
    if rows.is_inference() or columns.is_inference():  # which count no versions
        refuse_wrong(rows, columns, out, in_features)
        return
    key = _key(rows, columns, out, in_features)
    memory = rows.untyped_storage(), columns.untyped_storage()
    seen = _seen.get(key)
    if seen is not None and (seen.rows.cdata, seen.columns.cdata) == tuple(one._cdata for one in memory):
        return
    refuse_wrong(rows, columns, out, in_features)
    if len(_seen) >= REMEMBERED:
        _seen.clear()
    _seen[key] = _Seen(*map(StorageWeakRef, memory))


def is_capturing(tensor: Tensor) -> bool:
    """Whether a CUDA graph is being captured where a tensor `[...]` is."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _key(rows: Tensor, columns: Tensor, out: int, in_features: int) -> tuple[int, ...]:
    """What the result of a check depends on: addresses, number, versions, size of the matrix."""
    places = rows.data_ptr(), columns.data_ptr(), rows.numel()
    return (*places, rows._version, columns._version, out, in_features)


def refuse_wrong(rows: Tensor, columns: Tensor, out: int, in_features: int) -> None:
    """Check all positions now, whether or not they were checked before.

    Args:
        rows: `[k]`, int32, k > 0; of stacked matrices `[experts, k]`.
        columns: of that shape, int32.
        out: rows of the matrix.
        in_features: columns of the matrix.

    Raises:
        ValueError: see `check_positions`.
    """
    first, last = rows[..., 0], rows[..., -1]
    inside = (columns >= 0).all() & (columns < in_features).all() & (first >= 0).all() & (last < out).all()
    if inside & (rows[..., 1:] >= rows[..., :-1]).all():  # one wait for the device
        return
    for name, index, size in (("salient_rows", rows, out), ("salient_columns", columns, in_features)):
        wrong = index[(index < 0) | (index >= size)]
        if wrong.numel():
            raise ValueError(
                f"a salient position is out of range: {name} has {int(wrong[0])}, "
                f"which is not in 0..{size - 1}; load the layer's tensors again"
            )
    raise ValueError(
        "a salient position is out of order: salient_rows must be sorted; load the layer's tensors again"
    )


def _are_few_and_good(rows: list[int], columns: list[int], out: int, in_features: int) -> bool:
    """Whether a few positions are good, in Python numbers: five times as fast as torch for so few."""
    inside = min(columns) >= 0 and max(columns) < in_features and rows[0] >= 0 and rows[-1] < out
    return inside and sorted(rows) == rows
