"""Subspace of high precision: the few axes in which vectors vary most, last; the others first.

A basis is an orthogonal matrix whose columns are the new axes: `x @ basis` are the new coordinates. The axes
are ordered by the variance along them, and mixed by random rotations within the two parts, which leaves each
part's energy where it is and spreads what is large in one coordinate over all of its part. Not here: whose
variance (`quantize.bases`), and how the parts are rounded (`kernels.integer_product`).

Source: arXiv 2412.14363 (ResQ), theorem 4.2: of all subspaces of a size, the one of the leading eigenvectors
leaves the least to be rounded coarsely.
"""

import torch
from torch import Tensor

STEP = 8
"""A subspace has a multiple of so many columns."""


def subspace_columns(columns: int, share: float) -> int:
    """Columns of the subspace: the multiple of `STEP` that is nearest to a share, and at least one.

    Args:
        columns: of the whole space.
        share: 0 to below 1; 0: there is no subspace.

    Raises:
        ValueError: the subspace would be the whole space, or more.

    >>> [subspace_columns(columns, 1 / 8) for columns in (16, 64, 576, 896, 4096)]
    [8, 8, 72, 112, 512]
    """
    if not share:
        return 0
    found = STEP * max(1, round(columns * share / STEP))
    if found >= columns:
        raise ValueError(f"a subspace={share:g} of {columns} columns would be {found}, which leaves none")
    return found


def principal_axes(covariance: Tensor) -> Tensor:
    """The eigenvectors of a covariance, of the largest variance last.

    Args:
        covariance: `[..., n, n]`, symmetric.

    Returns:
        `[..., n, n]`, float64, orthogonal; the axes are its columns.

    >>> principal_axes(torch.diag(torch.tensor([3.0, 1.0]))).abs().tolist()
    [[0.0, 1.0], [1.0, 0.0]]
    """
    _, axes = torch.linalg.eigh(covariance.double())
    found: Tensor = axes
    return found


def channel_axes(covariance: Tensor) -> Tensor:
    """The coordinates themselves, of the largest variance last: what methods that keep outlier channels have.

    Args:
        covariance: `[..., n, n]`.

    Returns:
        `[..., n, n]`, float64: a permutation.
    """
    order = covariance.diagonal(dim1=-2, dim2=-1).argsort(-1)
    return torch.eye(covariance.shape[-1], dtype=torch.float64, device=order.device)[order].mT


def mixed(axes: Tensor, columns: int, generator: torch.Generator) -> Tensor:
    """Axes, mixed at random within the subspace and within the rest.

    Args:
        axes: `[..., n, n]`, float64, orthogonal.
        columns: of the subspace, which are the last.
        generator: of the random rotations.

    Returns:
        `[..., n, n]`, float64, orthogonal; its last columns span what the last ones of `axes` do.
    """
    *heads, size, _ = axes.shape
    turn = torch.zeros_like(axes)
    low = size - columns
    turn[..., :low, :low] = _random_rotation((*heads, low, low), generator)
    turn[..., low:, low:] = _random_rotation((*heads, columns, columns), generator)
    return axes @ turn


def energy(covariance: Tensor, axes: Tensor, columns: int) -> Tensor:
    """The share of all variance that lies in the subspace of the last columns.

    Args:
        covariance: `[..., n, n]`.
        axes: `[..., n, n]`, orthogonal.
        columns: of the subspace.

    Returns:
        `[...]`, float64, 0 to 1.

    >>> variances = torch.diag(torch.tensor([1.0, 2.0, 5.0]))
    >>> round(float(energy(variances, torch.eye(3), 1)), 3)
    0.625
    """
    last = axes[..., axes.shape[-1] - columns :].double()
    kept = torch.einsum("...ic,...ij,...jc->...", last, covariance.double(), last)
    return kept / covariance.double().diagonal(dim1=-2, dim2=-1).sum(-1)


def _random_rotation(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Orthogonal matrices `[..., n, n]`, uniformly distributed (Haar)."""
    turn: Tensor
    turn, upper = torch.linalg.qr(torch.randn(shape, dtype=torch.float64, generator=generator))
    turn.mul_(upper.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2))
    return turn
