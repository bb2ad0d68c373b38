"""weight = low-bit part + salient part: the parts that are stored, their names, shapes and dtypes.

`part_specs` is the one place that says what a stored layer is made of; the empty module, the loader,
the format test and the README's table all ask it. Every shape is a function of `(out, in, scheme)`.
Not here: devices, modules, configs, files; whether stored parts are sound (`checks`).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from svdq_hf.column_scale import column_scale
from svdq_hf.feedback import quantize_with_feedback
from svdq_hf.grid import Grid, expand, quantize, row_blocks, scale_of
from svdq_hf.packing import look_up_into, pack, packed_shape, padded_width, unpack_into
from svdq_hf.sparse import salient_count, take_out

FORMAT_VERSION = 4
"""The newest version of the stored format; a file of an older version loads for ever.

1: codes are -8..7. 2: may have levels of its own, a scale for each column, and groups' scales of 8 bits.
3: may have codes of 3 or 8 bits. 4: may have stacks of experts, k may differ from layer to layer, and an
embedding may be packed.
"""

EXPERTS_VERSION = 4
"""The oldest version that can say that a model has quantized experts."""


@dataclass(frozen=True)
class Scheme:
    """How one weight is stored: `k` salient entries (a count, or a share below 1), the rest on `grid`."""

    k: int | float = 256
    grid: Grid = field(default_factory=Grid)

    @property
    def format_version(self) -> int:
        """The oldest version of the format that can say what is stored."""
        grid = self.grid
        if grid.bits != 4:
            return 3
        return 2 if grid.levels != "linear" or grid.column_scale or grid.row_scale else 1


class PartSpec(NamedTuple):
    """Shape and dtype of one stored tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def part_specs(out: int, in_features: int, scheme: Scheme) -> dict[str, PartSpec]:
    """The tensors stored for a weight `[out, in]`, by name.

    weight: packed codes; weight_scale; salient_values `[k]`, FP32; salient_rows and salient_columns
    `[k]`, sorted by row, then by column. Where the grid has them: row_scale `[out]`; column_scale
    `[in]`; levels `[2**bits]`, of the codes from the lowest on.

    >>> {name: spec.shape for name, spec in part_specs(8, 96, Scheme(k=3)).items()}
    ... # doctest: +NORMALIZE_WHITESPACE
    {'weight': (8, 64), 'weight_scale': (8, 2),
     'salient_values': (3,), 'salient_rows': (3,), 'salient_columns': (3,)}
    """
    k = salient_count(scheme.k, out, in_features)
    optional = {
        "row_scale": (scheme.grid.row_scale, PartSpec((out,), torch.bfloat16)),
        "column_scale": (scheme.grid.column_scale, PartSpec((in_features,), torch.bfloat16)),
        "levels": (scheme.grid.levels != "linear", PartSpec((len(scheme.grid.table),), torch.int8)),
    }
    return {
        "weight": PartSpec((out, *packed_shape(in_features, scheme.grid.bits)), torch.int8),
        "weight_scale": PartSpec(scheme.grid.scale_shape(out, in_features), scheme.grid.scale_dtype),
        "salient_values": PartSpec((k,), torch.float32),
        "salient_rows": PartSpec((k,), torch.int32),
        "salient_columns": PartSpec((k,), torch.int32),
        **{name: spec for name, (there, spec) in optional.items() if there},
    }


def stack_specs(experts: int, out: int, in_features: int, scheme: Scheme) -> dict[str, PartSpec]:
    """The tensors stored for the weights `[experts, out, in]` of all experts: each one's parts, stacked.

    >>> stack_specs(4, 8, 96, Scheme(k=3))["salient_rows"].shape
    (4, 3)
    """
    specs = part_specs(out, in_features, scheme)
    return {name: PartSpec((experts, *spec.shape), spec.dtype) for name, spec in specs.items()}


PARTS = (
    "weight", "weight_scale", "salient_values", "salient_rows", "salient_columns",
    "row_scale", "column_scale", "levels",
)  # fmt: skip
"""The names of all parts that a layer may have, in the op's order."""

OPTIONAL = ("row_scale", "column_scale", "levels")


def decompose(
    weight: Tensor,
    rows: Tensor,
    columns: Tensor,
    scheme: Scheme,
    per_column: Tensor | None = None,
    gram: Tensor | None = None,
) -> dict[str, Tensor]:
    """Split `weight` `[out, in]`, float32, into the parts of `part_specs`.

    The entries at (rows, columns), `[k]` each, sorted as `top_positions` sorts them, are taken out
    first; the scales are fitted to the rest. At a salient position the code is zero, so the weight
    is the sum of the two parts. per_column: its `column_scale`, where that is known already. gram: of the
    inputs, `[in, in]`, for rounding with error feedback.

    >>> scheme, index = Scheme(k=1), torch.tensor([0], dtype=torch.int32)
    >>> parts = decompose(torch.tensor([[100.0, 7.0]]), index, index, scheme)
    >>> parts["salient_values"].tolist(), reconstruct(parts, 2, scheme).tolist()
    ([100.0], [[100.0, 7.0]])
    """
    rest, values = take_out(weight, rows, columns)
    salient = None
    # For one rule a zero is not the same as no weight; and feedback must not move what is kept.
    if scheme.grid.scale == "sigma" or gram is not None:
        salient = torch.zeros_like(weight, dtype=torch.bool)
        salient[rows.long(), columns.long()] = True
    optional = {}
    if scheme.grid.column_scale:
        optional["column_scale"] = column_scale(weight) if per_column is None else per_column
        size = optional["column_scale"].float()
        rest /= size  # a copy of our own
        if gram is not None:
            weight, gram = weight / size, gram * size * size.unsqueeze(1)
    if scheme.grid.levels != "linear":
        optional["levels"] = torch.tensor(scheme.grid.table, dtype=torch.int8, device=weight.device)
    if gram is None or salient is None:
        codes, scale, row_scale = quantize(rest, scheme.grid, salient)
    else:
        codes, scale, row_scale = quantize_with_feedback(weight, scheme.grid, gram, salient)
    if row_scale is not None:
        optional["row_scale"] = row_scale
    return {
        "weight": pack(codes, scheme.grid.bits),
        "weight_scale": scale,
        "salient_values": values,
        "salient_rows": rows,
        "salient_columns": columns,
        **optional,
    }


def reconstruct(parts: Mapping[str, Tensor], in_features: int, scheme: Scheme) -> Tensor:
    """The weight `[out, in]`, float32, that the parts stand for."""
    packed = parts["weight"]
    dense = torch.empty(packed.shape[0], in_features, dtype=torch.float32, device=packed.device)
    for rows, block in dense_blocks(parts, in_features, scheme.grid.columns(in_features)):
        dense[rows] = block
    return dense


def relative_error(weight: Tensor, parts: Mapping[str, Tensor], scheme: Scheme) -> float:
    """`|weight - reconstructed| / |weight|` in the Frobenius norm, 0 for a weight of zeros.

    >>> scheme, none = Scheme(k=0), torch.empty(0, dtype=torch.int32)
    >>> parts = decompose(torch.eye(4), none, none, scheme)
    >>> relative_error(torch.eye(4), parts, scheme) < 2**-8  # the rounding of a bfloat16 scale
    True
    """
    error = total = 0.0
    top = max(-float(weight.min()), float(weight.max())) or 1.0  # in its units no square overflows
    for rows, block in dense_blocks(parts, weight.shape[1], scheme.grid.columns(weight.shape[1])):
        error += float(((weight[rows] - block) / top).double().square().sum())
        total += float((weight[rows] / top).double().square().sum())
    return float((error / total) ** 0.5) if total else 0.0


def take_rows(parts: Mapping[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    """The parts of the matrix that has these `rows` `[n]`, in their order; a row may come twice.

    >>> parts = decompose(torch.eye(4), *torch.empty(2, 0, dtype=torch.int32), Scheme(k=0))
    >>> reconstruct(take_rows(parts, torch.tensor([2, 2])), 4, Scheme(k=0)).argmax(1).tolist()
    [2, 2]
    """
    found = dict(parts)
    for name in ("weight", "row_scale", "weight_scale"):
        if name in parts and parts[name].shape[0] == parts["weight"].shape[0]:  # not a scale for all
            found[name] = parts[name].index_select(0, rows)  # which refuses a row below 0
    wanted = rows.to(parts["salient_rows"].dtype)
    starts = torch.searchsorted(parts["salient_rows"], wanted)
    counts = torch.searchsorted(parts["salient_rows"], wanted, right=True) - starts
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
    """The weight in blocks of rows: `(rows, block [rows, in])`, float32, in one buffer used again.

    group: columns that share a scale. A block is valid until the next one is asked for, so a dense
    copy of the weight never exists on a CPU; other devices take the whole weight as one block, which
    costs no look at the data (and so no synchronisation).
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
    """Which salient entries fall into which block: the rows are sorted, so each block has a stretch."""
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
