"""A weight for integer activations: two stored weights, of the columns outside the subspace and in it.

Both are stored as any other weight is; what is in the subspace has 8 bits, a scale for each row, and names of
its own: `subspace_weight`, which has no filling, and `subspace_scale`. The columns are in the order in which
the layer arranges its inputs (`core.activations`). Not here: shapes of a whole layer (`format.parts`).
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from svdq_hf.core.activations import SUBSPACE_BITS
from svdq_hf.core.packing import pack, unpack
from svdq_hf.format.decode import reconstruct
from svdq_hf.format.parts import SUBSPACE_PARTS, SUBSPACE_SCHEME, Scheme


class Half(NamedTuple):
    """One of the two stored weights, `[out, columns]`.

    Attributes:
        parts: its stored parts by name, as `part_specs` names them.
        columns: its columns.
        scheme: how it is stored.
    """

    parts: dict[str, Tensor]
    columns: int
    scheme: Scheme

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        return self.scheme.grid.columns(self.columns)


def halves(parts: Mapping[str, Tensor], in_features: int, scheme: Scheme) -> list[Half]:
    """The stored weights that a layer is made of; where it has no subspace, one.

    Args:
        parts: stored parts of a weight `[out, in]`, by name (`part_specs`).
        in_features: its columns.
        scheme: how it is stored, with `activations`.
    """
    low, high = scheme.columns(in_features)
    outside = {name: part for name, part in parts.items() if name not in SUBSPACE_PARTS}
    found = [Half(outside, low, scheme.without_activations)]
    if high:
        none = {name: part[:0] for name, part in outside.items() if name.startswith("salient")}
        codes = pack(parts["subspace_weight"], SUBSPACE_BITS)
        inside = {"weight": codes, "weight_scale": parts["subspace_scale"], **none}
        found.append(Half(inside, high, SUBSPACE_SCHEME))
    return found


def joined(outside: Mapping[str, Tensor], inside: Mapping[str, Tensor], high: int) -> dict[str, Tensor]:
    """The parts of a layer, from those of its two weights.

    Args:
        outside: stored parts of the columns `[out, in - high]` outside of the subspace, by name.
        inside: of those in it, `[out, high]`.
        high: columns in the subspace.
    """
    codes = unpack(inside["weight"], high)
    return {**outside, "subspace_weight": codes, "subspace_scale": inside["weight_scale"]}


def arranged_weight(parts: Mapping[str, Tensor], in_features: int, scheme: Scheme) -> Tensor:
    """The weight that stored parts represent, its columns in the order of the arranged inputs.

    Args:
        parts: stored parts of a weight `[out, in]`, by name (`part_specs`).
        in_features: its columns.
        scheme: how it is stored, with `activations`.

    Returns:
        `[out, in]`, float32.
    """
    both = halves(parts, in_features, scheme)
    return torch.cat([reconstruct(half.parts, half.columns, half.scheme) for half in both], 1)
