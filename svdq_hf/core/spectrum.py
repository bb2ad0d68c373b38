"""Spectrum of a weight and the outliers of its outputs: spectral decay, PCDR, stable rank, outlier ratio.

Source: S2D, arXiv 2602.14432. A few leading singular values of a weight make the largest outputs of a layer,
and a penalty on these values alone takes the outliers away. Not here: the triplets (`core.svd`), where the
outputs come from (`training.peaks`), and training (`training.spectral_decay`).
"""

import torch
from torch import Tensor

from svdq_hf.core.svd import Principal

MOST_SAMPLED = 2**16
"""Most values that a median is taken of: its error is below 1 %, and sorting them takes a millisecond."""


def decay_penalty(values: Tensor, strength: float, power: float) -> float:
    """The penalty `strength / (power + 1) * sum(values ** (power + 1))`.

    Args:
        values: singular values `[k]`.
        strength: lambda, its factor.
        power: n. With 1 and all values this is weight decay, half of strength times the squared norm.

    >>> decay_penalty(torch.tensor([3.0, 4.0]), strength=0.1, power=1)
    1.25
    """
    return strength / (power + 1) * float(values.double().pow(power + 1).sum())


def decay_factors(found: Principal, count: int, strength: float, power: float) -> tuple[Tensor, Tensor]:
    """The penalty's gradient by the weight, `strength * U @ S ** power @ V.T`, as two factors.

    Args:
        found: leading triplets of a weight `[out, in]`.
        count: how many of its singular values the penalty has.
        strength: lambda, the penalty's factor.
        power: n, one less than the exponent in the penalty.

    Returns:
        `left [out, count]` and `right [in, count]`; the gradient is `left @ right.T`.

    >>> found = Principal(torch.eye(2), torch.tensor([4.0, 1.0]), torch.eye(2), 0.0)
    >>> left, right = decay_factors(found, 1, 0.25, 2)
    >>> (left @ right.T).tolist()
    [[4.0, 0.0], [0.0, 0.0]]
    """
    return found.u[:, :count] * (strength * found.s[:count] ** power), found.v[:, :count]


def dominance(found: Principal, inputs: Tensor, units: Tensor, outputs: Tensor) -> Tensor:
    """PCDR: the share that the first k singular components have in a layer's largest outputs, for each k.

    An output is a sum over the components, `s_j * (x @ v_j) * u_j[unit]`. Its share is that of sizes (each
    component's absolute value), so opposite signs do not cancel; what is beyond the given triplets, and the
    bias, count as one component. The mean over outputs weighs each by its square.

    Args:
        found: the r leading triplets of the weight `[out, in]`.
        inputs: tokens X `[outputs, in]`, one for each output.
        units: row of the weight that made each output, `[outputs]`.
        outputs: the outputs, `[outputs]`.

    Returns:
        Shares for k = 1 ... r, `[r]`, float32, from 0 to 1, rising.

    Source: arXiv 2602.14432, whose exact formula no text that we could read has.

    >>> one = Principal(torch.eye(2)[:, :1], torch.tensor([3.0]), torch.eye(2)[:, :1], 0)
    >>> dominance(one, torch.tensor([[1.0, 5.0]]), torch.tensor([0]), torch.tensor([4.0])).tolist()
    [0.75]
    """
    parts = (inputs.float() @ found.v) * found.s * found.u[units]
    sizes = parts.abs().cumsum(1)
    rest = (outputs.float() - parts.sum(1)).abs()
    shares = sizes / (sizes[:, -1] + rest).clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(1)
    weights = outputs.double().square()
    mean = (weights.unsqueeze(1) * shares).sum(0) / weights.sum().clamp(min=torch.finfo(torch.float64).tiny)
    return mean.float()


def least_count(shares: Tensor, tau: float) -> int:
    """The least k whose share reaches tau; 0 where none does.

    Args:
        shares: for k = 1 ... r, `[r]`, rising.
        tau: from 0 to 1.

    >>> [least_count(torch.tensor([0.5, 0.97, 0.99]), tau) for tau in (0.0, 0.95, 1.0)]
    [1, 2, 0]
    """
    reached = (shares >= tau).nonzero()
    return int(reached[0]) + 1 if len(reached) else 0


def stable_rank(weight: Tensor, largest: float) -> float:
    """Squared Frobenius norm over the squared largest singular value, from 1 to the rank.

    Args:
        weight: `[out, in]`.
        largest: its largest singular value.

    >>> stable_rank(torch.eye(5), 1.0)
    5.0
    """
    return float(weight.double().square().sum()) / largest**2 if largest > 0 else 0.0


def outlier_ratio(values: Tensor) -> float:
    """Largest over median absolute value; of many values the median is that of an even sample.

    Args:
        values: activations `[...]`.

    >>> outlier_ratio(torch.tensor([[1.0, -2.0], [3.0, -40.0]]))
    20.0
    """
    sizes = values.detach().abs().flatten()
    middle = float(sizes[:: -(-sizes.numel() // MOST_SAMPLED)].float().median())
    return float(sizes.max()) / middle if middle > 0 else float("inf")


def kurtosis(values: Tensor) -> float:
    """Fourth central moment over the squared variance; 3 for normal values.

    Args:
        values: activations `[...]`.

    >>> kurtosis(torch.tensor([-1.0, 1.0, -1.0, 1.0]))
    1.0
    """
    centred = values.detach().float()
    squares = (centred - centred.mean()).square_()
    variance = float(squares.mean())
    return float((squares / variance).square_().mean()) if variance > 0 else 0.0
