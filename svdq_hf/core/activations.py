"""Activations in integers: how a layer orders its inputs, and rounds each token to few bits.

A token is rounded between its smallest and largest value (asymmetric), or in a share of that range where
this loses less: `x ~ scale * (code - zero)`, of whole numbers `code` and `zero`. A layer may turn its inputs
by a Hadamard matrix first, and may have a subspace whose columns are rounded to 8 bits: the last columns of
the input, or of each head in it. Not here: the product (`kernels.integer_product`), and rotations that are
folded into weights (`quantize.rotate`).

Source: arXiv 2412.14363 (ResQ), section 4.1.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from svdq_hf.core import rotation
from svdq_hf.core.subspace import subspace_columns

SUBSPACE_BITS = 8
"""Bits of activations and weights in the subspace."""


@dataclass(frozen=True)
class Activations:
    """How a layer rounds its inputs `[..., in]`.

    Attributes:
        bits: of the columns outside of the subspace.
        subspace: share of the columns that are in it; 0: there is none.
        heads: into how many equal parts the input is cut, the subspace being the last columns of each.
        hadamard: whether the input is first multiplied by `core.rotation.hadamard(in)`.
    """

    bits: Literal[4, 8] = 4
    subspace: float = 0.0
    heads: int = 1
    hadamard: bool = False

    def columns(self, in_features: int) -> tuple[int, int]:
        """Columns outside of the subspace, and in it.

        Args:
            in_features: columns of the input.

        Raises:
            ValueError: no such layer can be: `heads` does not divide the columns, the subspace is as large as
                a head, or the columns cannot be turned.

        >>> Activations(4, 1 / 8, heads=3).columns(192)
        (168, 24)
        """
        if in_features % self.heads:
            raise ValueError(f"heads={self.heads} does not divide the {in_features} columns of the input")
        if self.hadamard:
            rotation.check_order(in_features)
        inside = self.heads * subspace_columns(in_features // self.heads, self.subspace)
        return in_features - inside, inside

    def arranged(self, x: Tensor) -> Tensor:
        """Inputs in the order of the stored columns: turned, then the subspace last.

        Args:
            x: `[..., in]`.

        >>> Activations(4, 1 / 8, heads=2).arranged(torch.arange(32))[-16:].tolist()
        [8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31]
        """
        x = rotation.rotate(x) if self.hadamard else x
        if self.heads == 1:
            return x
        of_a_head = [columns // self.heads for columns in self.columns(x.shape[-1])]
        parts = torch.split(self._by_head(x), of_a_head, -1)
        return torch.cat([part.flatten(-2) for part in parts], -1)

    def restored(self, x: Tensor) -> Tensor:
        """Undo `arranged`, which is orthogonal: the weight for inputs as they come, from the stored one.

        Args:
            x: `[..., in]`.
        """
        if self.heads > 1:
            parts = torch.split(x, list(self.columns(x.shape[-1])), -1)
            x = torch.cat([self._by_head(part) for part in parts], -1).flatten(-2)
        return rotation.rotate(x) if self.hadamard else x

    def _by_head(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:-1], self.heads, x.shape[-1] // self.heads)


class Rounded(NamedTuple):
    """Tokens in whole numbers: `x ~ scale * (codes - zero)`.

    Attributes:
        codes: `[tokens, in]`, int8: of b bits from -2**(b-1) on.
        scale: `[tokens, 1]`, float32; 0 for a token of zeros.
        zero: `[tokens, 1]`, int8: the code of zero.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor


CLIPS = {4: (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7), 8: (1.0,)}
"""Shares of a token's range that are tried, by bits; the one of least squared error is taken."""


def round_tokens(x: Tensor, bits: int) -> Rounded:
    """Round each token to whole numbers of a scale of its own; zero stays zero.

    Args:
        x: `[tokens, in]`, of any float dtype.
        bits: of a code, 4 or 8.

    >>> codes, scale, zero = round_tokens(torch.tensor([[-1.0, 0.0, 14.0]]), 4)
    >>> codes.tolist(), scale.tolist(), zero.tolist()
    ([[-8, -7, 7]], [[1.0]], [[-7]])
    """
    x = x.float()
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    best, error = _rounded(x, low, high, bits)
    for share in CLIPS[bits][1:]:
        found, own = _rounded(x, share * low, share * high, bits)
        better = own < error
        best = Rounded(*(torch.where(better, *pair) for pair in zip(found, best, strict=True)))
        error = torch.where(better, own, error)
    return best


def _rounded(x: Tensor, low: Tensor, high: Tensor, bits: int) -> tuple[Rounded, Tensor]:
    """Tokens rounded between `low` and `high` `[tokens, 1]`, and their squared errors `[tokens, 1]`."""
    least, steps = -(2 ** (bits - 1)), 2**bits - 1
    scale = (high - low) / steps
    unit = torch.where(scale > 0, scale, 1.0)
    zero = least + torch.round(-low / unit)
    codes = torch.round(x / unit).add_(zero).clamp_(least, least + steps)
    error = (scale * (codes - zero) - x).square().sum(-1, keepdim=True)
    return Rounded(codes.to(torch.int8), scale, zero.to(torch.int8)), error
