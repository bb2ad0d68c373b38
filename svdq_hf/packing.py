"""4-bit codes <-> bytes, in half-split blocks of 64.

Why half-split and not neighbouring pairs: the low nibbles of a block are 32 consecutive codes and
the high nibbles the next 32, so a vector register is filled by one AND and one shift, with no
shuffle, on the stored bytes as they are. Not here: where the codes come from (`grid`).
"""

import torch
from torch import Tensor

BLOCK = 64
"""Codes in a block; a row is padded with zeros to a whole number of blocks."""

HALF = BLOCK // 2
"""Bytes in a block: byte i holds code i (low nibble) and code i + HALF (high nibble)."""

LOWEST, HIGHEST = -8, 7
"""The range of a code; the stored nibble is `code - LOWEST`, so that zero is 8."""


def packed_width(in_features: int) -> int:
    """Bytes in a packed row of `in_features` codes.

    >>> packed_width(64), packed_width(65)
    (32, 64)
    """
    return HALF * -(-in_features // BLOCK)


def pack(codes: Tensor) -> Tensor:
    """Pack codes `[out, in]`, int8 in -8..7, into bytes `[out, 32 * ceil(in / 64)]`, int8.

    Every row starts a new block; the rest of the last block is code zero.

    >>> row = torch.zeros(1, 64, dtype=torch.int8)
    >>> row[0, 0], row[0, 32] = 1, -8  # nibbles 9 (low) and 0 (high) of byte 0
    >>> pack(row)[0, :2].tolist()  # 0x09 and, both zero, 0x88
    [9, -120]
    """
    out, in_features = codes.shape
    padding = 2 * packed_width(in_features) - in_features
    nibbles = torch.nn.functional.pad(codes, (0, padding)).sub_(LOWEST).view(torch.uint8)
    width = packed_width(in_features)
    low, high = nibbles.view(out, width // HALF, 2, HALF).unbind(2)  # [out, blocks, 32] each
    return (low | (high << 4)).reshape(out, width).view(torch.int8)


def unpack(packed: Tensor, in_features: int) -> Tensor:
    """Unpack bytes `[out, 32 * ceil(in / 64)]` into codes `[out, in]`, int8 in -8..7.

    >>> codes = torch.arange(-8, 7, dtype=torch.int8).repeat(2, 5)
    >>> torch.equal(unpack(pack(codes), 75), codes)
    True
    """
    rows = packed.shape[0]
    padded = packed.new_empty(rows, 2 * packed.shape[1])
    unpack_into(packed, padded)
    return padded[:, :in_features].contiguous()


def look_up_into(packed: Tensor, padded: Tensor, levels: Tensor) -> None:
    """Like `unpack_into`, but with the levels `[16]` of the codes instead of the codes themselves."""
    rows, width = packed.shape
    halves = padded.view(rows, width // HALF, 2, HALF)
    nibble = torch.arange(256, device=packed.device)
    place = packed.view(torch.uint8).view(-1).int()
    values = levels.to(padded.dtype)
    for half, table in enumerate((values[nibble & 0x0F], values[nibble >> 4])):
        halves[:, :, half].copy_(table.index_select(0, place).view(rows, width // HALF, HALF))


def unpack_into(packed: Tensor, padded: Tensor) -> None:
    """Unpack bytes `[rows, width]` into a given buffer `[rows, 2 * width]` of any dtype, with padding."""
    rows, width = packed.shape
    halves = padded.view(rows, width // HALF, 2, HALF)
    blocks = packed.view(rows, width // HALF, HALF)
    # Contiguous temporaries of a byte a code: writing results into the halves would not vectorise.
    halves[:, :, 0].copy_((blocks & 0x0F).add_(LOWEST))
    high = blocks.view(torch.uint8) >> 4  # unsigned: a signed shift would copy the top bit
    halves[:, :, 1].copy_(high.view(torch.int8).add_(LOWEST))
