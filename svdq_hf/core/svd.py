"""Principal structure of a matrix: its leading singular triplets, exact or by block Krylov iteration.

Source: C. Musco and C. Musco, "Randomized block Krylov methods for stronger and faster approximate
singular value decomposition" (2015, arXiv 1504.05477). A plain randomised SVD (a few power steps) finds the
leading *values* well and the leading *space* badly when sigma_r+1 is close to sigma_r, and it is the space
that decides which weights are salient. Keeping every power step's block in one basis repairs that.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Method = Literal["krylov", "exact"]

BLOCK_COLUMNS = 16
"""Fewest columns of a Krylov block; for r > 8 it is r + 8, so that the block spans the r wanted."""

STEPS = 8
"""Power steps. Six choose 0.995 of the exact method's weights, eight 1.000 (measured)."""

WARM_STEPS = 5
"""Power steps from triplets that are nearly right: after 100 training steps the leading three are exact to
1e-5 (measured on MiniLM)."""


@dataclass(frozen=True)
class Principal:
    """The r leading singular triplets of W `[out, in]`: `W ~ u @ diag(s) @ v.T`.

    Attributes:
        u: left vectors, `[out, r]`, float32.
        s: singular values, `[r]`, falling, float32.
        v: right vectors, `[in, r]`, float32.
        sigma_ratio: sigma_r+1 / sigma_r, from 0 (the leading space is well determined) to 1 (it is not
            determined at all).
    """

    u: Tensor
    s: Tensor
    v: Tensor
    sigma_ratio: float

    def matrix(self) -> Tensor:
        """The rank-r matrix `[out, in]` of these triplets, float32."""
        return (self.u * self.s) @ self.v.T

    def leading(self, count: int) -> "Principal":
        """The first `count` triplets, at least one, or all where there are fewer."""
        if count >= len(self.s):
            return self
        last, following = self.s[count - 1 : count + 1].tolist()
        ratio = following / last if last > 0 else 1.0
        return Principal(self.u[:, :count], self.s[:count], self.v[:, :count], ratio)

    def contiguous(self) -> "Principal":
        """The same, with tensors that are contiguous in memory."""
        u, s, v = (part.contiguous() for part in (self.u, self.s, self.v))
        return Principal(u, s, v, self.sigma_ratio)


def principal(
    weight: Tensor,
    rank: int,
    *,
    method: Method = "krylov",
    seed: int = 0,
    column_scale: Tensor | None = None,
    start: Principal | None = None,
) -> Principal:
    """The leading singular triplets of a weight.

    Args:
        weight: `[out, in]`, of any float dtype; a large one is read in blocks.
        rank: number of triplets; at most min(out, in) are returned.
        method: "exact" is the float64 eigenproblem of the smaller Gram matrix. "krylov" costs a fixed number
            of products with the matrix, and becomes "exact" where its basis would span half of the space.
        seed: of the random start of "krylov".
        column_scale: `[in]`; the triplets are those of the weight divided by it. None: of the weight itself.
        start: triplets of nearly the same weight; "krylov" then takes half the steps. None: a random start.

    Returns:
        The triplets, float32.

    Raises:
        ValueError: the weight is empty.

    Source: arXiv 1504.05477.

    >>> identity = principal(torch.diag(torch.tensor([3.0, 2.0, 1.0])), 1)
    >>> round(float(identity.s[0]), 5), round(identity.sigma_ratio, 5)
    (3.0, 0.66667)
    """
    if min(weight.shape) == 0:
        raise ValueError(f"weight {tuple(weight.shape)} is empty: it has no singular values")
    matrix = _Matrix(weight, column_scale)
    rank = min(rank, matrix.smaller)
    block = max(BLOCK_COLUMNS, rank + 8)
    steps = STEPS if start is None else WARM_STEPS
    if method == "exact" or 2 * block * (steps + 1) >= matrix.smaller:
        left, values, right = _ritz(matrix.blocks, matrix.larger, rank)
    else:
        known = None if start is None else (start.u if matrix.flipped else start.v)
        first = _start_block(matrix, block, seed, known)
        basis, images = _krylov(matrix, first, steps)
        left, values, inner = _ritz(images, matrix.larger, rank)
        right = basis @ inner
    if matrix.flipped:
        left, right = right, left
    last, following = float(values[rank - 1]), float(values[rank]) if rank < matrix.smaller else 0.0
    ratio = following / last if last > 0 else 1.0
    return Principal(left, values[:rank] * matrix.unit, right, ratio)


Rows = Callable[[], Iterator[tuple[slice, Tensor]]]
"""Blocks of rows of a matrix, anew at each call: which rows, and the block `[rows, n]`, float32."""

BLOCK_WEIGHTS = 1 << 20
"""Weights in a block: four megabytes of float32, which both products with it find in cache."""


MOST_COPIED = 1 << 23
"""Weights of a matrix that is made float32 as a whole, once for all readings: 32 megabytes."""


class _Matrix:
    """A weight, divided by its columns' scales, on its side: `[larger, smaller]`, in blocks of rows.

    In units in which the Gram matrix of 1e30 and that of 1e-30 are float32; ordinary weights are in units of
    1. The scales multiply vectors, not the weight.
    """

    def __init__(self, weight: Tensor, column_scale: Tensor | None) -> None:
        low, high = (float(end) for end in weight.aminmax())
        top = max(-low, high)
        self.unit = 1.0 if 1e-6 < top < 1e6 or top == 0 else top
        self.flipped = weight.shape[0] < weight.shape[1]
        dense = weight.float() if weight.numel() <= MOST_COPIED else weight
        self.weight = dense.T if self.flipped else dense
        self.larger, self.smaller = self.weight.shape
        columns = torch.full((weight.shape[1],), 1 / self.unit, dtype=torch.float32, device=weight.device)
        self.columns = columns if column_scale is None else columns / column_scale.float()

    def dense(self) -> Iterator[tuple[slice, Tensor]]:
        """Blocks of the weight itself, `[rows, smaller]`, float32."""
        step = max(1, BLOCK_WEIGHTS // self.smaller) if self.weight.is_cpu else self.larger
        for start in range(0, self.larger, step):
            rows = slice(start, min(start + step, self.larger))
            yield rows, self.weight[rows].float()

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Blocks of the matrix, `[rows, smaller]`."""
        for rows, dense in self.dense():
            yield rows, dense * (self.columns[rows].unsqueeze(1) if self.flipped else self.columns)

    def images(self, vectors: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Blocks `[n, rows]` of the products of the matrix with some vectors `[n, smaller]`."""
        scaled = vectors if self.flipped else vectors * self.columns
        for rows, dense in self.dense():
            image = scaled @ dense.T
            yield rows, image.mul_(self.columns[rows]) if self.flipped else image

    def gram_times(self, vectors: Tensor, images: Tensor | None) -> Tensor:
        """`vectors @ M.T @ M`, `[n, smaller]`, in one reading of M; the images `[n, larger]` may be kept."""
        scaled = vectors if self.flipped else vectors * self.columns
        total = torch.zeros_like(vectors)
        for rows, dense in self.dense():
            image = scaled @ dense.T
            if images is not None:
                images[:, rows] = image * self.columns[rows] if self.flipped else image
            total.addmm_(image.mul_(self.columns[rows].square()) if self.flipped else image, dense)
        return total if self.flipped else total.mul_(self.columns)


def _ritz(rows: Rows, larger: int, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Leading triplets of `[larger, n]`: u `[larger, rank]`, all sigma `[n]` falling, v `[n, rank]`."""
    gram: Tensor | float = 0.0
    for _, block in rows():
        wide = block.double()
        gram = gram + wide.T @ wide
    eigenvalues, eigenvectors = torch.linalg.eigh(gram)
    values = eigenvalues.flip(0).clamp_(min=0).sqrt_()
    right = eigenvectors.flip(1)[:, :rank]
    floor = float(values[0]) * torch.finfo(torch.float64).eps or 1.0  # a sigma of 0 has left vector 0
    left = torch.empty(larger, rank, dtype=torch.float32, device=right.device)
    for part, block in rows():
        left[part] = ((block.double() @ right) / values[:rank].clamp(min=floor)).float()
    return left, values.float(), right.float()


def _start_block(matrix: _Matrix, columns: int, seed: int, known: Tensor | None) -> Tensor:
    """Random columns `[smaller, columns]`, the first of which are vectors `[smaller, r]` that are known."""
    generator = torch.Generator().manual_seed(seed)  # on the CPU: the same start on every device
    start = torch.randn(matrix.smaller, columns, generator=generator, dtype=torch.float32, device="cpu")
    start = start.to(matrix.weight.device)
    return start if known is None else torch.cat([known.to(start), start], dim=1)[:, :columns]


def _krylov(matrix: _Matrix, start: Tensor, steps: int) -> tuple[Tensor, Rows]:
    """Orthonormal basis `[smaller, n]` of the Krylov space of `M.T @ M`, and its images `[larger, n]`.

    The images come with the steps that make the basis; only of a very tall matrix they are made anew.
    """
    device, block = start.device, start.shape[1]
    basis = torch.empty(block * (steps + 1), matrix.smaller, dtype=torch.float32, device=device)
    basis[:block] = torch.linalg.qr(start).Q.T
    tall = matrix.larger * basis.shape[0] > MOST_IMAGES
    images = None if tall else torch.empty(basis.shape[0], matrix.larger, dtype=torch.float32, device=device)
    for done in range(block, block * (steps + 1), block):
        known, latest = basis[:done], slice(done - block, done)
        following = matrix.gram_times(basis[latest], None if images is None else images[latest])
        for _ in range(2):  # once leaves float32 rounding in the basis; twice is enough
            following -= (following @ known.T) @ known
            following = torch.linalg.qr(following.T).Q.T
        basis[done : done + block] = following
    # Of a matrix of low rank the space is soon exhausted, and what follows is noise, not orthogonal.
    orthonormal, rest = torch.linalg.qr(basis.T)
    if images is None or float(rest.diagonal().abs().min()) < 0.5:
        return orthonormal, lambda: ((rows, image.T) for rows, image in matrix.images(orthonormal.T))
    for rows, image in matrix.images(basis[-block:]):
        images[-block:, rows] = image
    turned, found = torch.linalg.inv(rest.double()).float(), images
    height = BLOCK_WEIGHTS // basis.shape[0]
    parts = [slice(first, min(first + height, matrix.larger)) for first in range(0, matrix.larger, height)]
    return orthonormal, lambda: ((part, found[:, part].T @ turned) for part in parts)


MOST_IMAGES = 1 << 23
"""Numbers in the images that are kept: 32 megabytes."""
