"""The product of rounded tokens and a rounded weight, from their whole numbers: exact but for the scales.

Codes, levels and scales of groups are whole numbers, and so are a token's codes; their product is computed in
float64, where sums of whole numbers are exact below 2**53, so that any order of summation gives the same. The
scales of token and row, the only real numbers, come last: `y = scale * row_scale * (codes - zero) @ W`. Not
here: how tokens are rounded (`core.activations`); kernels that multiply bytes, which would give the same.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from svdq_hf.core.activations import Rounded
from svdq_hf.core.packing import look_up_into, padded_width, unpack_into
from svdq_hf.core.rounding import expand, row_blocks


def multiply(tokens: Rounded, parts: Mapping[str, Tensor], group: int) -> Tensor:
    """Multiply rounded tokens by a stored weight.

    Args:
        tokens: `[tokens, in]`.
        parts: stored parts of a weight `[out, in]` whose scales are int8 by groups, or one for each row, and
            which has no column scale; salient entries are not looked at.
        group: columns that share a scale.

    Returns:
        `[tokens, out]`, float64.
    """
    whole = (tokens.codes.to(torch.int16) - tokens.zero).double()
    y = whole.new_empty(whole.shape[0], parts["weight"].shape[0])
    for rows, weight, unit in whole_weight(parts, whole.shape[1], group):
        y[:, rows] = (whole @ weight.T) * unit
    return y * tokens.scale


def whole_weight(
    parts: Mapping[str, Tensor], in_features: int, group: int
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """A stored weight as whole numbers and a unit for each row, in blocks of rows.

    Args:
        parts: stored parts of a weight `[out, in]`, as for `multiply`.
        in_features: its columns.
        group: columns that share a scale.

    Yields:
        Rows; whole numbers `[rows, in]`, float64; and units `[rows]` or `[1]`, float64.
    """
    packed, scale, levels = parts["weight"], parts["weight_scale"], parts.get("levels")
    for rows in row_blocks(packed.shape[0], padded_width(packed), packed.device):
        block = packed[rows]
        whole = torch.empty(block.shape[0], padded_width(packed), dtype=torch.float64, device=packed.device)
        if levels is None:
            unpack_into(block, whole)
        else:
            look_up_into(block, whole, levels)
        whole = whole[:, :in_features]
        if "row_scale" in parts:
            yield rows, whole * expand(scale[rows], group, in_features), parts["row_scale"][rows].double()
        else:
            yield rows, whole, scale[rows if scale.shape[0] > 1 else slice(None)].double().flatten()
