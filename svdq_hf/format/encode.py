"""Encoding: a weight `[out, in]` and its salient positions -> the stored parts; and the error that it costs.

Not here: the way back (`format.decode`), and which positions are salient (`core.saliency`, `core.topk`).
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from svdq_hf.core.error_feedback import quantize_with_feedback
from svdq_hf.core.normalized import NormalizedWeight
from svdq_hf.core.packing import pack
from svdq_hf.core.rounding import Quantized, quantize
from svdq_hf.format.decode import dense_blocks
from svdq_hf.format.parts import Scheme


def encode(weight: NormalizedWeight, rows: Tensor, columns: Tensor) -> dict[str, Tensor]:
    """Split a weight into the parts of `part_specs`.

    The salient entries are taken out first; the scales are fitted to the rest. At a salient
    position the code is zero, so the weight is the sum of the two parts.

    Args:
        weight: the weight `[out, in]`, and the grid it is rounded on.
        rows: row of each salient entry, `[k]`, int32, sorted as `top_positions` sorts them.
        columns: column of each salient entry, `[k]`, int32.

    Returns:
        The stored parts by name; shapes and dtypes are those of `part_specs`.
    """
    found = _rounded(weight, rows, columns)
    packed = pack(found.codes, weight.grid.bits)
    return stored_parts(weight, (rows, columns), packed, found.scale, found.row_scale)


def stored_parts(
    weight: NormalizedWeight,
    positions: tuple[Tensor, Tensor],
    packed: Tensor,
    scale: Tensor,
    row_scale: Tensor | None,
) -> dict[str, Tensor]:
    """The parts of a weight whose codes and scales are known, by name.

    Args:
        weight: the weight `[out, in]`, and the grid it is rounded on.
        positions: rows and columns of the salient entries, `[k]` each, int32, sorted.
        packed: codes, `[out, *packed_shape]`, int8.
        scale: of `Grid.scale_shape` and `Grid.scale_dtype`.
        row_scale: `[out]`, bfloat16; None where the grid has none.

    Returns:
        The stored parts by name; shapes and dtypes are those of `part_specs`.
    """
    grid, (rows, columns) = weight.grid, positions
    optional: dict[str, Tensor | None] = {"column_scale": weight.column_scale, "levels": None}
    if grid.levels != "linear":
        optional["levels"] = torch.tensor(grid.table, dtype=torch.int8, device=weight.dense.device)
    optional["row_scale"] = row_scale
    return {
        "weight": packed,
        "weight_scale": scale,
        "salient_values": weight.dense[rows.long(), columns.long()].float(),
        "salient_rows": rows,
        "salient_columns": columns,
        **{name: part for name, part in optional.items() if part is not None},
    }


def _rounded(weight: NormalizedWeight, rows: Tensor, columns: Tensor) -> Quantized:
    """The codes and scales of all entries that are not salient."""
    if weight.gram is not None:  # feedback must not move what is kept
        kept = _mask(weight.dense, rows, columns)
        return quantize_with_feedback(weight.normalized, weight.grid, weight.gram, kept)
    # Only the rule "sigma" needs the mask: zeros would lower its standard deviation.
    salient = _mask(weight.dense, rows, columns) if weight.grid.scale == "sigma" else None
    return quantize(weight.without(rows, columns), weight.grid, salient)


def _mask(weight: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    mask = torch.zeros_like(weight, dtype=torch.bool)
    mask[rows.long(), columns.long()] = True
    return mask


def decompose(
    weight: Tensor, rows: Tensor, columns: Tensor, scheme: Scheme, gram: Tensor | None = None
) -> dict[str, Tensor]:
    """`encode` of a plain tensor.

    Args:
        weight: `[out, in]`, float32.
        rows: row of each salient entry, `[k]`, int32, sorted as `top_positions` sorts them.
        columns: column of each salient entry, `[k]`, int32.
        scheme: its grid is the one the other entries are rounded on.
        gram: `X^T X` `[in, in]` of the inputs, for rounding with error feedback.

    Returns:
        The stored parts by name; shapes and dtypes are those of `part_specs`.

    >>> from svdq_hf.format.decode import reconstruct
    >>> scheme, index = Scheme(k=1), torch.tensor([0], dtype=torch.int32)
    >>> parts = decompose(torch.tensor([[100.0, 7.0]]), index, index, scheme)
    >>> parts["salient_values"].tolist(), reconstruct(parts, 2, scheme).tolist()
    ([100.0], [[100.0, 7.0]])
    """
    return encode(NormalizedWeight(weight, scheme.grid, gram), rows, columns)


def relative_error(weight: Tensor, parts: Mapping[str, Tensor], scheme: Scheme) -> float:
    """`|weight - reconstructed| / |weight|` in the Frobenius norm; 0 for a weight of zeros.

    Args:
        weight: `[out, in]`, of any float dtype.
        parts: its stored parts, by name.
        scheme: how they are stored.

    >>> scheme, none = Scheme(k=0), torch.empty(0, dtype=torch.int32)
    >>> parts = decompose(torch.eye(4), none, none, scheme)
    >>> relative_error(torch.eye(4), parts, scheme) < 2**-8  # the rounding of a bfloat16 scale
    True
    """
    error = total = 0.0
    top = max(-float(weight.min()), float(weight.max())) or 1.0  # in its units no square overflows
    for rows, block in dense_blocks(parts, weight.shape[1], scheme.grid.columns(weight.shape[1])):
        here = weight[rows].float()
        error += float(((here - block) / top).double().square().sum())
        total += float((here / top).double().square().sum())
    return float((error / total) ** 0.5) if total else 0.0
