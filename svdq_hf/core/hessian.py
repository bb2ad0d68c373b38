"""The inverse of a layer's Hessian `H = X^T X`, damped so that there is one.

Scores and error feedback both need it. Not here: where H comes from (`calibration`).
"""

import torch
from torch import Tensor

DAMPING = 0.01
"""Share of H's mean diagonal that is always added to it: what GPTQ and SpQR use."""


def damped_inverse(hessian: Tensor) -> Tensor:
    """`(H + DAMPING * mean(diagonal) * I)^-1` of `H` `[in, in]`, float64, which is changed.

    An input that was always zero has no say: its diagonal is the damping alone. Where all were, H is 1.

    >>> damped_inverse(torch.zeros(2, 2, dtype=torch.float64)).diagonal().tolist()
    [1.0, 1.0]
    """
    diagonal = hessian.diagonal()
    diagonal += DAMPING * float(diagonal.mean()) or 1.0
    inverse: Tensor = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    return inverse
