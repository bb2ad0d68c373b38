"""Block types of ggml: a matrix rounded to 4 to 8 bits, and the bytes that llama.cpp reads.

Each is codes and scales of a row's blocks. IQ4_NL: sixteen levels of a table, 32 codes and a float16 scale;
Q5_0 and Q8_0: whole numbers, likewise; Q6_K: groups of 16 with int8 scales, 256 codes and a float16 scale for
those. Nibbles are half-split: byte i holds code i and code i + 16. Source of the layouts: ggml-quants.c and
gguf's quants.py. Not here: which tensor gets which type (`integrations.gguf.mixture`).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from svdq_hf.core.error_feedback import quantize_with_feedback
from svdq_hf.core.grid import Grid
from svdq_hf.core.packing import LOWEST
from svdq_hf.core.rounding import quantize, row_blocks

IQ4_NL_GRID = Grid(32, levels="iq4_nl")


@dataclass(frozen=True)
class BlockType:
    """A block type: how it is called and numbered, its size, and how rows become bytes.

    Attributes:
        name: ggml's.
        number: ggml's, in files.
        columns: codes of a block; a row has a whole number of blocks.
        bytes: of a block.
        encode: rows `[rows, in]`, float32, to their bytes `[rows, bytes]`, uint8.
    """

    name: str
    number: int
    columns: int
    bytes: int
    encode: Callable[[Tensor], Tensor]

    def row_bytes(self, in_features: int) -> int:
        """Bytes of a row of `in_features` codes."""
        return in_features // self.columns * self.bytes

    def encoded(self, weight: Tensor) -> Tensor:
        """A matrix as bytes.

        Args:
            weight: `[out, in]`, float32; `in` is a multiple of `columns`.

        Returns:
            `[out, row_bytes(in)]`, uint8.
        """
        return torch.cat([self.encode(weight[rows]) for rows in row_blocks(*weight.shape)])


def with_feedback(weight: Tensor, gram: Tensor) -> Tensor:
    """A matrix as bytes of IQ4_NL, rounded with error feedback.

    Args:
        weight: `[out, in]`, float32.
        gram: `X^T X` `[in, in]` of its inputs.

    Returns:
        `[out, bytes]`, uint8.
    """
    kept = torch.zeros(1, 1, dtype=torch.bool).expand_as(weight)
    found = quantize_with_feedback(weight, IQ4_NL_GRID, gram, kept)
    return _nibbles_and_scales(found.codes, found.scale)


def _iq4_nl(rows: Tensor) -> Tensor:
    found = quantize(rows, IQ4_NL_GRID)
    return _nibbles_and_scales(found.codes, found.scale)


def _nibbles_and_scales(codes: Tensor, scale: Tensor) -> Tensor:
    """Bytes `[rows, 18 * groups]` of codes `[rows, in]` from -8 on, and float16 scales `[rows, groups]`."""
    unsigned = (codes - LOWEST).view(torch.uint8).view(len(codes), -1, 32)
    return torch.cat([_bytes(scale), _halves(unsigned)], 2).flatten(1)


def _halves(codes: Tensor) -> Tensor:
    """Half-split nibbles `[..., 16]` of codes `[..., 32]` from 0 to 15, uint8."""
    return codes[..., :16] | codes[..., 16:] << 4


def _bytes(scale: Tensor) -> Tensor:
    """The two bytes of each float16 scale, `[rows, groups, 2]`."""
    return scale.unsqueeze(2).contiguous().view(torch.uint8)


def _q8_0(rows: Tensor) -> Tensor:
    groups = rows.reshape(len(rows), -1, 32)
    scale = (groups.abs().amax(2) / 127).half()
    codes = _divided(groups, scale.float()).round_().clamp_(-127, 127)
    return torch.cat([_bytes(scale), codes.to(torch.int8).view(torch.uint8)], 2).flatten(1)


def _q5_0(rows: Tensor) -> Tensor:
    groups = rows.reshape(len(rows), -1, 32)
    scale = fitted(groups, 16).half()
    codes = (_divided(groups, scale.float()).round_().clamp_(-16, 15) + 16).to(torch.uint8)
    return torch.cat([_bytes(scale), _top_bits(codes >> 4), _halves(codes & 15)], 2).flatten(1)


def _top_bits(bits: Tensor) -> Tensor:
    """Bits `[..., 32]`, 0 or 1, as four bytes, the first bit lowest."""
    places = torch.arange(8, dtype=torch.uint8)
    of_bytes = bits.reshape(*bits.shape[:-1], 4, 8) << places
    return of_bytes.sum(-1, dtype=torch.uint8)


def _q6_k(rows: Tensor) -> Tensor:
    groups = rows.reshape(len(rows), -1, 16, 16)  # [rows, blocks, 16 groups, 16 columns]
    fine = fitted(groups, 32)
    unit = (fine.abs().amax(2) / 127).half()
    scale = _divided(fine, unit.float()).round_().clamp_(-127, 127)
    step = scale * unit.float().unsqueeze(2)
    codes = (_divided(groups, step).round_().clamp_(-32, 31) + 32).to(torch.uint8).flatten(2)
    quarters = codes.view(len(rows), -1, 2, 4, 32)  # halves of 128 codes, each of four quarters
    low = quarters & 15
    nibbles = torch.stack([low[..., 0, :] | low[..., 2, :] << 4, low[..., 1, :] | low[..., 3, :] << 4], 3)
    pairs = ((quarters >> 4) << PLACES_OF_PAIRS).sum(3, dtype=torch.uint8)
    parts = [nibbles.flatten(2), pairs.flatten(2), scale.to(torch.int8).view(torch.uint8), _bytes(unit)]
    return torch.cat(parts, 2).flatten(1)


PLACES_OF_PAIRS = torch.tensor([[0], [2], [4], [6]], dtype=torch.uint8)
"""Where the top two bits of a quarter's codes stand in their byte."""


def _divided(groups: Tensor, scale: Tensor) -> Tensor:
    """Weights `[..., columns]` in units of their scales `[...]`; zero where the scale is."""
    step = scale.unsqueeze(-1)
    return torch.where(step == 0, 0.0, groups / step)


TRIES = 9
"""Scales tried for whole numbers: the largest weight rounds to the lowest code, or to one just beyond it."""


def fitted(groups: Tensor, most: int) -> Tensor:
    """Scales of least squared error where codes are whole numbers from `-most` to `most - 1`.

    The largest weight gets the side that has one code more, as in llama.cpp's Q4_0.

    Args:
        groups: weights `[..., columns]`, float32.
        most: the lowest code, without its sign.

    Returns:
        Scales `[...]`, float32, of either sign; zero for a group of zeros.

    >>> fitted(torch.tensor([[16.0, -15.0, 3.0]]), 16).tolist()
    [-1.0]
    """
    place = groups.abs().argmax(-1, keepdim=True)
    top = groups.gather(-1, place)
    unit = groups / torch.where(top == 0, 1.0, top)  # in -1..1, and the largest is 1
    best, best_gain = torch.zeros_like(top), torch.zeros_like(top)
    for step in range(TRIES):
        codes = (unit * -(most - 0.8 + 0.2 * step)).round_().clamp_(-most, most - 1)
        along, square = (unit * codes).sum(-1, keepdim=True), codes.square().sum(-1, keepdim=True)
        gain = along.square() / square.clamp(min=1)
        best = torch.where(gain > best_gain, along / square.clamp(min=1), best)
        best_gain = torch.maximum(gain, best_gain)
    return (best * top).squeeze(-1)


IQ4_NL = BlockType("IQ4_NL", 20, 32, 18, _iq4_nl)
Q5_0 = BlockType("Q5_0", 6, 32, 22, _q5_0)
Q6_K = BlockType("Q6_K", 14, 256, 210, _q6_k)
Q8_0 = BlockType("Q8_0", 8, 32, 34, _q8_0)
ALL = (IQ4_NL, Q5_0, Q6_K, Q8_0)
