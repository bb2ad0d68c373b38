"""Column scales: one factor for each column of a weight, so that a large column does not decide its group's
scale.

The idea is SINQ's (arXiv 2509.22944), which evens out rows and columns in turns; here the rows' part is
left to the scales of the groups. Not here: taking the scale out of a weight (`core.normalized`).
"""

import torch
from torch import Tensor

COLUMN_ROUNDS = 4
"""Rounds of `column_scale`; the fifth changes no scale by more than a percent (measured)."""


def column_scale(weight: Tensor) -> Tensor:
    """One scale for each column of a weight: dividing by it makes all columns equally large.

    Alternates between rows and columns: the scale of a column is its root mean square in the matrix whose
    rows have been made equally large.

    Args:
        weight: `[out, in]`, float32.

    Returns:
        `[in]`, bfloat16, all above 0, with a geometric mean of 1.

    Source: SINQ, arXiv 2509.22944.

    >>> column_scale(torch.tensor([[1.0, 4.0], [2.0, 8.0]])).tolist()
    [0.5, 2.0]
    """
    top = weight.abs().amax().clamp(min=torch.finfo(torch.float32).tiny)
    size = (weight / top).square_()  # squares neither overflow nor, where they matter, vanish
    scale = torch.ones(weight.shape[1], dtype=torch.float32, device=weight.device)
    for _ in range(COLUMN_ROUNDS):
        rows = (size @ (1 / scale)).clamp_(min=SMALLEST).reciprocal_()
        columns = rows @ size
        scale = torch.where(columns > 0, columns, scale).clamp_(min=SMALLEST)
        scale /= scale.log().mean().exp()
    return scale.sqrt().to(torch.bfloat16)


SMALLEST = 1e-30
"""Replaces a mean square of zero; its reciprocal fits in float32."""
