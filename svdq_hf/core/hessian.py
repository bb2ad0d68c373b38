"""The damped inverse of a layer's Hessian `H = X^T X`; damping makes H invertible.

Scores and error feedback both need it. Not here: where H comes from (`calibration.inputs`).
"""

import torch
from torch import Tensor

DAMPING = 0.01
"""Share of H's mean diagonal that is always added to it: what GPTQ and SpQR use."""


def damped_inverse(hessian: Tensor) -> Tensor:
    """`(H + DAMPING * mean(diagonal of H) * I)^-1`.

    Args:
        hessian: H, `[in, in]`, float64; overwritten. All zeros (every input was zero) counts as I.

    Returns:
        The inverse, `[in, in]`, float64.

    Source: GPTQ, arXiv 2210.17323, and SpQR, arXiv 2306.03078, which damp so.

    >>> zeros, identity = torch.zeros(2, 2, dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    >>> torch.equal(damped_inverse(zeros), identity)
    True
    """
    diagonal = hessian.diagonal()
    diagonal += DAMPING * float(diagonal.mean()) or 1.0
    inverse: Tensor = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    return inverse
