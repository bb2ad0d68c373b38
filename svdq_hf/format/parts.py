"""weight = low-bit part + salient part: the parts that are stored, their names, shapes and dtypes.

`part_specs` is the one place that says what a stored layer is made of; the empty module, the loader,
the format test and the README's table all ask it. Every shape is a function of `(out, in, scheme)`.
Not here: devices, modules, configs, files; whether stored parts are sound (`checks`).
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from svdq_hf.core.grid import Grid
from svdq_hf.core.packing import packed_shape
from svdq_hf.core.topk import salient_count


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
