"""Weight `[out, in]` and salient positions -> the stored parts, and the relative error that this costs."""

from collections.abc import Mapping

import torch
from torch import Tensor

from svdq_hf.core.column_scale import column_scale
from svdq_hf.core.error_feedback import quantize_with_feedback
from svdq_hf.core.packing import pack
from svdq_hf.core.rounding import quantize
from svdq_hf.core.topk import take_out
from svdq_hf.format.decode import dense_blocks
from svdq_hf.format.parts import Scheme


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

    >>> from svdq_hf.format.decode import reconstruct
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
