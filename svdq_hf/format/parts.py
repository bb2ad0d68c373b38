"""Parts of a stored weight (packed codes, scales, salient entries): their names, shapes and dtypes.

A stored weight is the sum of a low-bit part and a salient part. `part_specs` is the one place that says what
it is made of; the empty module, the loader, the format test and the format's page all take it from here.
Every shape is a function of `(out, in, scheme)`. Not here: devices, modules, configs, files; whether stored
parts are sound (`format.checks`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from svdq_hf.core.activations import Activations
from svdq_hf.core.grid import Grid
from svdq_hf.core.packing import packed_shape
from svdq_hf.core.topk import salient_count
from svdq_hf.format.versions import ACTIVATIONS_VERSION


@dataclass(frozen=True)
class Scheme:
    """How one weight is stored.

    Attributes:
        k: salient entries: a count, or (a float below 1) a share of the weight's entries.
        grid: layout of the scales of all other entries.
        activations: how the layer rounds its inputs; None: not at all.
    """

    k: int | float = 256
    grid: Grid = field(default_factory=Grid)
    activations: Activations | None = None

    @property
    def format_version(self) -> int:
        """The oldest version of the format that can express this scheme."""
        grid = self.grid
        if self.activations is not None:
            return ACTIVATIONS_VERSION
        if grid.bits != 4:
            return 3
        return 2 if grid.levels != "linear" or grid.column_scale or grid.row_scale else 1

    @property
    def without_activations(self) -> "Scheme":
        """The scheme of the columns outside of the subspace, as a weight by itself."""
        return replace(self, activations=None)

    def columns(self, in_features: int) -> tuple[int, int]:
        """Columns outside of the subspace, and in it."""
        return (in_features, 0) if self.activations is None else self.activations.columns(in_features)


SUBSPACE_SCHEME = Scheme(0, Grid("row", bits=8))
"""How the columns in the subspace are stored, as a weight by itself."""


class PartSpec(NamedTuple):
    """Shape and dtype of one stored tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def part_specs(out: int, in_features: int, scheme: Scheme) -> dict[str, PartSpec]:
    """The tensors stored for one weight.

    Args:
        out: rows of the weight `[out, in]`.
        in_features: its columns.
        scheme: how it is stored.

    Returns:
        Shape and dtype by part:

        * weight: packed codes, `[out, *packed_shape]`, int8.
        * weight_scale: `[out, groups]`, `[out, 1]` or `[1, 1]`; dtype of `Grid.scale_dtype`.
        * salient_values: `[k]`, float32.
        * salient_rows, salient_columns: `[k]`, int32, sorted by row, then by column.
        * row_scale: `[out]`, bfloat16, where group scales have 8 bits.
        * column_scale: `[in]`, bfloat16, where the grid has one.
        * levels: `[2**bits]`, int8, of the codes from the lowest on, where they are not linear.

        With a subspace of `high` columns the above is of the other `in - high` columns, and there are

        * subspace_weight: codes of 8 bits as they are, `[out, high]`, int8.
        * subspace_scale: `[out, 1]`, float32.

    >>> {name: spec.shape for name, spec in part_specs(8, 96, Scheme(k=3)).items()}
    ... # doctest: +NORMALIZE_WHITESPACE
    {'weight': (8, 64), 'weight_scale': (8, 2),
     'salient_values': (3,), 'salient_rows': (3,), 'salient_columns': (3,)}
    """
    in_features, high = scheme.columns(in_features)
    k = salient_count(scheme.k, out, in_features)
    optional = {
        "row_scale": (scheme.grid.row_scale, PartSpec((out,), torch.bfloat16)),
        "column_scale": (scheme.grid.column_scale, PartSpec((in_features,), torch.bfloat16)),
        "levels": (scheme.grid.levels != "linear", PartSpec((len(scheme.grid.table),), torch.int8)),
        "subspace_weight": (high > 0, PartSpec((out, high), torch.int8)),
        "subspace_scale": (high > 0, PartSpec((out, 1), torch.float32)),
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
    """The tensors stored for all experts of a layer: the parts of each expert, stacked.

    Args:
        experts: how many there are.
        out: rows of each weight.
        in_features: columns of each weight.
        scheme: how each weight is stored.

    Returns:
        Shape, with `experts` as first dimension, and dtype by part.

    >>> stack_specs(4, 8, 96, Scheme(k=3))["salient_rows"].shape
    (4, 3)
    """
    specs = part_specs(out, in_features, scheme)
    return {name: PartSpec((experts, *spec.shape), spec.dtype) for name, spec in specs.items()}


class StoredWeight(NamedTuple):
    """The stored tensors of one weight `[out, in]`, in the order of the ops' arguments.

    `W = row_scale * weight_scale * level(weight) * column_scale`, plus the salient values at the k salient
    positions, where the code is zero. For a stack of experts each tensor has one more dimension, the first.

    Attributes:
        weight: packed codes, int8, in blocks of 64: `[out, 32 * blocks]` of 4 bits, `[out, blocks, 8 * bits]`
            of 3 and 8.
        weight_scale: `[out, groups]`, or `[1, 1]` for a whole matrix; bfloat16, int8 where there is a
            row_scale, float32 where there is one scale for each row or for the matrix.
        salient_values: `[k]`, float32.
        salient_rows: `[k]`, int32, sorted.
        salient_columns: `[k]`, int32, sorted within a row.
        row_scale: `[out]`, bfloat16, or None.
        column_scale: `[in]`, bfloat16, or None.
        levels: `[2**bits]`, int8, of the codes from the lowest on; None: codes are their own levels.
    """

    weight: Tensor
    weight_scale: Tensor
    salient_values: Tensor
    salient_rows: Tensor
    salient_columns: Tensor
    row_scale: Tensor | None = None
    column_scale: Tensor | None = None
    levels: Tensor | None = None

    @classmethod
    def of(cls, parts: Mapping[str, Tensor]) -> "StoredWeight":
        """The stored weight made of tensors by name; absent ones are None.

        Args:
            parts: the tensors of a weight `[out, in]`, by name (`part_specs`).
        """
        return cls(**parts)

    def as_dict(self) -> dict[str, Tensor]:
        """The tensors of the weight `[out, in]` by name, without absent ones."""
        return {name: part for name, part in zip(PARTS, self, strict=True) if part is not None}

    @property
    def out(self) -> int:
        """Rows of the weight."""
        return self.weight.shape[0]


PARTS = StoredWeight._fields
"""The names of all parts that a weight may have, in the op's order."""

SUBSPACE_PARTS = ("subspace_weight", "subspace_scale")
"""The names of the parts that a layer with integer activations may have beside these."""

ALL_PARTS = (*PARTS, *SUBSPACE_PARTS)
"""The names of all parts that a layer may have."""

OPTIONAL = tuple(StoredWeight._field_defaults)
