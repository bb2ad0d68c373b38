"""Walsh-Hadamard transform: a fixed rotation that spreads outliers over all coordinates, without data.

Rounding loses what the largest coordinate dictates; turned by a matrix whose entries are all about
1 / sqrt(n), a vector with one large coordinate becomes one with none. n = m * 2^k with m odd: the Hadamard
matrix of Sylvester for 2^k, times (Kronecker) the discrete Hartley transform for m, since Hadamard matrices
of odd order do not exist. Both are symmetric and orthogonal, so the rotation is its own inverse.

Not here: rotations learnt from data, and what is quantized after one.
"""

import math
from functools import lru_cache, reduce

import torch
from torch import Tensor

FACTOR = 64
"""Largest power of two that one product with a dense matrix turns; larger ones are turned by factors."""

LARGEST_ODD = 4096
"""Most that the odd part of an order may be: its factor is a dense matrix."""


def hadamard(n: int) -> Tensor:
    """The matrix of `rotate`: symmetric, orthogonal, its entries at most sqrt(2 / n) in size.

    Args:
        n: its order, at least 1; of a power of two all entries are 1 / sqrt(n) in size.

    Returns:
        `[n, n]`, float64.

    Raises:
        ValueError: n is not positive, or its odd part is more than `LARGEST_ODD`.

    >>> (2 * hadamard(4)).int().tolist()
    [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]
    """
    return reduce(torch.kron, map(_factor, _orders(n)))


def rotate(x: Tensor) -> Tensor:
    """Multiply by `hadamard(n)`, by its Kronecker factors: n log n operations rather than n^2.

    Twice gives x again. `W x` is `rotate(W)` times `rotate(x)`: inner products stay.

    Args:
        x: `[..., n]`, of any float dtype; float16 and bfloat16 are computed in float32.

    Returns:
        `[..., n]`, in the dtype of x.

    Raises:
        ValueError: see `hadamard`.

    >>> rotate(torch.tensor([8.0, 0, 0, 0])).tolist()
    [4.0, 4.0, 4.0, 4.0]
    """
    orders = _orders(x.shape[-1])
    exact = x.dtype if x.dtype == torch.float64 else torch.float32
    y = x.to(exact).reshape(-1, *orders)
    for axis, order in enumerate(orders, 1):
        turned = y.movedim(axis, -1) @ _factor(order).to(x.device, exact)
        y = turned.movedim(-1, axis)
    return y.reshape(x.shape).to(x.dtype)


def check_order(n: int) -> None:
    """Refuse an order that `rotate` does not turn.

    Args:
        n: columns that are to be turned.

    Raises:
        ValueError: see `hadamard`.
    """
    _orders(n)


def _orders(n: int) -> list[int]:
    """Orders of the Kronecker factors of `hadamard(n)`: its odd part, then powers of two up to `FACTOR`.

    Raises:
        ValueError: n is not positive, or its odd part is more than `LARGEST_ODD`.

    >>> _orders(64), _orders(1536), _orders(11008)
    ([64], [3, 8, 64], [43, 4, 64])
    """
    if n < 1:
        raise ValueError(f"n={n}: a rotation turns at least one coordinate")
    power = n & -n
    if n // power > LARGEST_ODD:
        raise ValueError(
            f"n={n}: its odd part is {n // power}, and a rotation turns those up to {LARGEST_ODD}"
        )
    orders: list[int] = []
    while power > FACTOR:
        orders.insert(0, FACTOR)
        power //= FACTOR
    found = [n // math.prod([power, *orders]), power, *orders]
    return [order for order in found if order > 1] or [1]


@lru_cache(maxsize=64)
def _factor(order: int) -> Tensor:
    """`[order, order]`, float64: Sylvester's matrix for a power of two, Hartley's for an odd order."""
    place = torch.arange(order)
    if order & (order - 1):
        angle = 2 * torch.pi / order * (place[:, None] * place % order).double()
        entries = angle.cos() + angle.sin()
    else:
        common = place[:, None] & place
        ones = torch.stack([common >> bit & 1 for bit in range(max(order.bit_length(), 1))]).sum(0)
        entries = 1.0 - 2 * (ones % 2).double()
    return entries / math.sqrt(order)
