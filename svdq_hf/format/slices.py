"""Slices and stacks of stored matrices: rows, columns, and several matrices in one, for serving engines.

Engines put q, k and v (gate and up) into one layer and cut layers over several devices: by rows where the
outputs are divided, by columns where the inputs are. All of it is done on the stored parts, and no weight is
rounded again: a slice of a quantized layer represents exactly that slice of its matrix. Not here: any engine
(`integrations.vllm`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from svdq_hf.core.grid import Grid
from svdq_hf.core.packing import BLOCK, pack, unpack
from svdq_hf.format.decode import reconstruct, take_rows
from svdq_hf.format.parts import Scheme

SMALLEST_GROUP = 8
"""Columns that share a scale, at least: no grid has fewer."""


@dataclass(frozen=True)
class StoredMatrix:
    """A matrix `[out, in]` in its stored parts.

    Attributes:
        parts: the tensors of `part_specs`, by name.
        in_features: columns of the matrix.
        grid: layout of the scales.
    """

    parts: dict[str, Tensor]
    in_features: int
    grid: Grid

    @property
    def out_features(self) -> int:
        """Rows of the matrix."""
        return self.parts["weight"].shape[0]

    @property
    def scheme(self) -> Scheme:
        """The scheme for which `part_specs` gives the shapes of these parts."""
        return Scheme(self.parts["salient_values"].shape[0], self.grid)

    def dequantize(self) -> Tensor:
        """The matrix `[out, in]`, float32."""
        return reconstruct(self.parts, self.in_features, self.scheme)


def slice_rows(stored: StoredMatrix, rows: Tensor) -> StoredMatrix:
    """The stored matrix of some rows: what one device keeps where the outputs are divided.

    Args:
        stored: a matrix `[out, in]`.
        rows: the rows wanted, `[n]`, in the order wanted.

    Returns:
        The matrix `[n, in]`.
    """
    return replace(stored, parts=take_rows(stored.parts, rows.to(stored.parts["weight"].device)))


def slice_columns(stored: StoredMatrix, start: int, stop: int) -> StoredMatrix:
    """The stored matrix of some columns: what one device keeps where the inputs are divided.

    Codes are packed anew, since a slice need not begin where a block of 64 does. Groups that a border cuts
    become smaller groups with the same scales.

    Args:
        stored: a matrix `[out, in]`.
        start: first column.
        stop: column after the last one.

    Returns:
        The matrix `[out, stop - start]`.

    Raises:
        ValueError: the columns are out of range, or a border would make groups smaller than any grid has.
    """
    if not 0 <= start < stop <= stored.in_features:
        raise ValueError(f"columns {start} to {stop} of a matrix that has {stored.in_features}")
    parts = dict(stored.parts)
    codes = unpack(parts["weight"], stored.in_features)[:, start:stop]
    parts["weight"] = pack(codes, stored.grid.bits)
    grid, parts["weight_scale"] = _scales_of_columns(stored, start, stop)
    if "column_scale" in parts:
        parts["column_scale"] = parts["column_scale"][start:stop].clone()
    columns = parts["salient_columns"]
    inside = (columns >= start) & (columns < stop)
    parts["salient_values"] = parts["salient_values"][inside]
    parts["salient_rows"] = parts["salient_rows"][inside]
    parts["salient_columns"] = columns[inside] - start
    return StoredMatrix(parts, stop - start, grid)


def _scales_of_columns(stored: StoredMatrix, start: int, stop: int) -> tuple[Grid, Tensor]:
    """The scales of some columns, and a grid that has their group size."""
    scale, grid = stored.parts["weight_scale"], stored.grid
    if not isinstance(grid.group_size, int):
        return grid, scale
    old = grid.columns(stored.in_features)
    first, last = start // old, (stop - 1) // old
    if first == last:  # one group, however it is cut
        return grid, scale[:, first : last + 1].clone()
    new = _whole_groups(math.gcd(start, old)) if start % old else old
    if new < SMALLEST_GROUP:
        raise ValueError(
            f"column {start} is inside of a group of {old}, and the pieces would be groups of {new}: no grid "
            f"has fewer than {SMALLEST_GROUP}; divide the columns at a multiple of {SMALLEST_GROUP}"
        )
    places = torch.arange(start, stop, new, device=scale.device) // old
    return replace(grid, group_size=new if start % old else grid.group_size), scale.index_select(1, places)


def _whole_groups(common: int) -> int:
    """The largest size of a group that divides `common`: a multiple of 64, or a power of two below.

    >>> _whole_groups(192), _whole_groups(96), _whole_groups(48), _whole_groups(20)
    (192, 32, 16, 4)
    """
    return common if common % BLOCK == 0 else common & -common


def stack(pieces: Sequence[StoredMatrix]) -> StoredMatrix:
    """One stored matrix of several on the same inputs, the rows of the first on top.

    Args:
        pieces: matrices `[out_i, in]`.

    Returns:
        The matrix `[sum of out_i, in]`.

    Raises:
        ValueError: they cannot be one stored matrix; `stack_conflict` gives the reason.
    """
    for piece in pieces[1:]:
        reason = stack_conflict(pieces[0], piece)
        if reason:
            raise ValueError(
                f"these matrices cannot be stacked: {reason}; keep them apart (`stack_where_possible`)"
            )
    pieces = [_scale_per_row(piece) for piece in pieces]
    heights = [piece.out_features for piece in pieces]
    starts = [sum(heights[:place]) for place in range(len(heights))]
    parts = {**pieces[0].parts}
    for name in ("weight", "weight_scale", "row_scale", "salient_values", "salient_columns"):
        if name in parts:
            parts[name] = torch.cat([piece.parts[name] for piece in pieces])
    rows = [piece.parts["salient_rows"] + start for piece, start in zip(pieces, starts, strict=True)]
    return replace(pieces[0], parts={**parts, "salient_rows": torch.cat(rows)})


def stack_conflict(one: StoredMatrix, other: StoredMatrix) -> str:
    """The reason why two matrices cannot be stacked into one stored matrix; empty where they can.

    The usual reason is column scales: each matrix has been fitted with other ones, and a stored matrix has
    one set of them.
    """
    if one.in_features != other.in_features:
        return f"they have {one.in_features} and {other.in_features} columns"
    if _kind(one) != _kind(other):
        return "their grids differ"
    for name in ("column_scale", "levels"):
        if name in one.parts and not torch.equal(one.parts[name], other.parts[name]):
            return f"each has its own {name}"
    return ""


def _kind(stored: StoredMatrix) -> tuple[object, ...]:
    """The part of a grid that decoding depends on; how the scales were found is left out."""
    grid = stored.grid
    group = grid.group_size if isinstance(grid.group_size, int) else "row"
    return group, grid.bits, grid.levels, grid.scale_bits, grid.column_scale


def _scale_per_row(stored: StoredMatrix) -> StoredMatrix:
    """The same matrix; a single scale for the whole matrix is repeated for each row."""
    if stored.grid.group_size != "tensor":
        return stored
    scale = stored.parts["weight_scale"].expand(stored.out_features, 1).clone()
    return replace(
        stored,
        parts={**stored.parts, "weight_scale": scale},
        grid=replace(stored.grid, group_size="row"),
    )


def stack_where_possible(pieces: Sequence[StoredMatrix]) -> list[StoredMatrix]:
    """The same rows in as few stored matrices as possible: neighbours that can be stacked are.

    Args:
        pieces: matrices `[out_i, in]`.

    Returns:
        Matrices whose rows, in order, are those of `pieces`.
    """
    joined: list[StoredMatrix] = []
    for piece in pieces:
        if joined and not stack_conflict(joined[-1], piece):
            joined[-1] = stack([joined[-1], piece])
        else:
            joined.append(piece)
    return joined
