"""Trellis-coded rounding as in QTIP (arXiv 2406.11235) and EXL3, without their data: the ceiling at 4 bits.

A row's codes are one string of bits; the value of each weight is computed from a window of the last bits, so
that neighbouring weights share them, and Viterbi's algorithm finds the string of least error. Rows are
rotated first. QTIP and EXL3 have windows of 16 bits, rotate rows too, round with data (LDLQ) and join each
sequence's ends; here the window is a choice, and what it holds before the first weight is stored.
"""

import torch
from quality_published import Rounded, rounded_after_rotation
from torch import Tensor

BITS = 4
COSTS = 1 << 19
"""States of all rows at a time: 2 MB of costs, which a core's caches hold."""


def trellis(weight: Tensor, window: int) -> Rounded:
    """A weight `[out, in]` in 4 bits, each value read from a window of so many bits."""
    values = computed_values(window)

    def to_values(rows: Tensor) -> Tensor:
        return torch.cat([values[viterbi(part, values)] for part in rows.split(max(1, COSTS >> window))])

    ends = window - BITS + 16  # of each row: what its first window holds besides, and its scale
    return BITS * weight.numel() + ends * len(weight), rounded_after_rotation(weight, to_values)


def computed_values(window: int) -> Tensor:
    """The value of every window, `[2**window]`, of variance 1: QTIP's code "3INST".

    A linear congruence scatters the bits; both halves of the word, with their exponents masked, are read as
    numbers of half precision, and their sum is nearly normal.
    """
    word = (torch.arange(1 << window) * 89226354 + 64248484) & 0xFFFFFFFF
    word = (word & 0x8FFF8FFF) ^ 0x3B603B60
    halves = torch.stack([word & 0xFFFF, word >> 16])
    signed = torch.where(halves < 1 << 15, halves, halves - (1 << 16)).to(torch.int16)
    values = signed.view(torch.float16).float().sum(0)
    return values / values.square().mean().sqrt()


def viterbi(rows: Tensor, values: Tensor) -> Tensor:
    """The windows of least squared error for each row.

    Window s follows p if s = (16 p + c) mod 2**window: those that share a history of all but 4 bits have
    the same 16 forerunners, and of these the forward pass keeps the least cost.

    Args:
        rows: `[rows, width]`.
        values: `[windows]`, of each window.

    Returns:
        Windows `[rows, width]`, int64.
    """
    step, square = 1 << BITS, values.square()
    cost = torch.empty(len(rows), len(values))
    least = torch.zeros(len(rows), len(values) // step)
    costs = []
    for weight in rows.T:
        costs.append(least)
        torch.addcmul(square, weight[:, None], values, value=-2, out=cost)  # the squared error less weight**2
        cost.view(*least.shape, step).add_(least[:, :, None])
        least = cost.view(len(rows), step, -1).amin(1)
    found = [cost.argmin(1)]
    for weight, before in zip(rows.T.flip(0)[1:], costs[-2::-1], strict=True):
        history = found[-1][:, None] >> BITS
        forerunners = history + torch.arange(step) * (len(values) // step)
        error = (weight[:, None] - values[forerunners]).square() + before.gather(1, forerunners >> BITS)
        found.append(forerunners.gather(1, error.argmin(1, keepdim=True))[:, 0])
    return torch.stack(found[::-1], 1)
