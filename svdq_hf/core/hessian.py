"""The inverse of H = X^T X, damped: what both error feedback and SpQR's score are made of.

Source: GPTQ (Frantar et al. 2022) and SpQR (arXiv 2306.03078) damp alike. Not here: how H is collected
(`calibration.inputs`), and what else may be added to it (`error_feedback.damped`).
"""

import torch
from torch import Tensor

DAMPING = 0.01
"""Added to H's diagonal, as a share of its mean: what GPTQ and SpQR use."""


def damped_inverse(hessian: Tensor) -> Tensor:
    """The inverse of `hessian` `[in, in]`, float64 and overwritten, with `DAMPING` on its diagonal.

    An input that was always zero has no say: its diagonal is the damping alone.

    >>> damped_inverse(torch.zeros(2, 2, dtype=torch.float64)).diagonal().tolist()
    [1.0, 1.0]
    """
    diagonal = hessian.diagonal()
    diagonal += DAMPING * float(diagonal.mean()) or 1.0  # inputs that are all zero say nothing
    return torch.cholesky_inverse(torch.linalg.cholesky(hessian))
