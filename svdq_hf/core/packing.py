"""Packed codes: codes of 3, 4 or 8 bits <-> bytes, in blocks of 64.

A code, made unsigned, is cut into fields of f bits, and the fields of a block into 8 / f planes of 8 * f
consecutive codes: byte i of a field holds that of code i, of code i + 8 f, and so on, the first in its lowest
bits. So 4 bits are one field: byte i holds code i in its low nibble and code i + 32 in its high one; 3 bits
are two: the lower two bits, then the top one; and 8 bits are bytes as they are.

Why planes and not neighbours: one AND and one shift fill a vector register from the stored bytes, with no
shuffle. Not here: where the codes come from (`core.rounding`, `core.levels`).
"""

from functools import reduce
from operator import or_

import torch
from torch import Tensor

from svdq_hf.core.grid_values import BLOCK as BLOCK  # as: re-exported for everybody who packs

HALF = BLOCK // 2
"""Bytes in a block of 4 bits: byte i holds code i (low nibble) and code i + HALF (high nibble)."""

LOWEST, HIGHEST = -8, 7
"""The range of a code of 4 bits; the stored nibble is `code - LOWEST`, so that zero is 8."""

RANGES: dict[int, tuple[int, int]] = {3: (-4, 3), 4: (LOWEST, HIGHEST), 8: (-127, 127)}
"""The range of a code, by bits."""

FIELDS: dict[int, tuple[int, ...]] = {3: (2, 1), 4: (4,), 8: (8,)}
"""The bits of each field of a code, from the lowest on; a field of f bits is 8 * f bytes of a block."""

ZERO = {3: 4, 4: 8, 8: 0}
"""The stored number for code zero, by bits."""


def packed_width(in_features: int) -> int:
    """Bytes in a packed row of `in_features` codes of 4 bits.

    >>> packed_width(64), packed_width(65)
    (32, 64)
    """
    return HALF * -(-in_features // BLOCK)


def packed_shape(in_features: int, bits: int) -> tuple[int, ...]:
    """Shape of a packed row: `[32 * blocks]` of 4 bits, `[blocks, 8 * bits]` of 3 or 8.

    The shape always differs from that of a dense row, so a loader that knows no packed weights stops. 8 bits
    without the dimension of blocks would be cast to float in silence.

    >>> packed_shape(65, 4), packed_shape(65, 3), packed_shape(64, 8)
    ((64,), (2, 24), (1, 64))
    """
    return (packed_width(in_features),) if bits == 4 else (-(-in_features // BLOCK), 8 * bits)


def bits_of(packed: Tensor) -> int:
    """Bits of a code, read off the shape of packed rows.

    Args:
        packed: `[rows, *packed_shape]`, int8.
    """
    return 4 if packed.ndim == 2 else packed.shape[-1] // 8


def padded_width(packed: Tensor) -> int:
    """Codes in a packed row, padding included.

    Args:
        packed: `[rows, *packed_shape]`, int8.
    """
    return 2 * packed.shape[1] if packed.ndim == 2 else BLOCK * packed.shape[1]


def pack(codes: Tensor, bits: int = 4) -> Tensor:
    """Pack codes into bytes.

    Every row starts a new block; the rest of its last block is code zero.

    Args:
        codes: `[out, in]`, int8, in `RANGES[bits]`.
        bits: of a code: 3, 4 or 8.

    Returns:
        Bytes `[out, *packed_shape]`, int8.

    >>> row = torch.zeros(1, 64, dtype=torch.int8)
    >>> row[0, 0], row[0, 32] = 1, -8  # nibbles 9 (low) and 0 (high) of byte 0
    >>> pack(row)[0, :2].tolist()  # 0x09 and, both zero, 0x88
    [9, -120]

    Of 3 bits, codes 3, -4, -1, 0 are stored as 7, 0, 3, 4: low bits 3, 0, 3, 0, top bits 1, 0, 0, 1.

    >>> row[0, 0], row[0, 16], row[0, 32], row[0, 8] = 3, -4, -1, 0
    >>> pack(row, 3)[0, 0, [0, 1, 16]].tolist()  # 0b00110011; 0; of codes 0, 8, 16, ..., 56: 0b11101011
    [51, 0, -21]
    """
    out, in_features = codes.shape
    blocks = -(-in_features // BLOCK)
    padded = torch.nn.functional.pad(codes, (0, BLOCK * blocks - in_features))
    unsigned = padded.add_(ZERO[bits]).view(torch.uint8)
    fields: list[Tensor] = []
    done = 0
    for field in FIELDS[bits]:
        taken = (unsigned >> done) & (2**field - 1)
        planes = taken.reshape(out, blocks, 8 // field, 8 * field).unbind(2)
        fields.append(reduce(or_, (plane << (field * place) for place, plane in enumerate(planes))))
        done += field
    return torch.cat(fields, -1).reshape(out, *packed_shape(in_features, bits)).view(torch.int8)


def unpack(packed: Tensor, in_features: int) -> Tensor:
    """Unpack bytes into codes.

    Args:
        packed: `[out, *packed_shape]`, int8.
        in_features: codes of a row, without the padding.

    Returns:
        Codes `[out, in]`, int8.

    >>> codes = torch.arange(-8, 7, dtype=torch.int8).repeat(2, 5)
    >>> torch.equal(unpack(pack(codes), 75), codes)
    True
    """
    padded = packed.new_empty(packed.shape[0], padded_width(packed))
    unpack_into(packed, padded)
    return padded[:, :in_features].contiguous()


def look_up_into(packed: Tensor, padded: Tensor, levels: Tensor) -> None:
    """Unpack bytes into a buffer, as the levels that the codes stand for.

    Args:
        packed: `[rows, *packed_shape]`, int8.
        padded: the buffer, `[rows, padded_width]`, of any float dtype; overwritten.
        levels: level of each code from the lowest on, `[2**bits]`.
    """
    values = levels.to(padded.dtype)
    if bits_of(packed) == 4:
        _look_up_nibbles(packed, padded, values)
    else:
        padded.view(-1).copy_(values.index_select(0, _unsigned(packed).view(-1).int()))


def unpack_into(packed: Tensor, padded: Tensor) -> None:
    """Unpack bytes into a buffer, as codes.

    Args:
        packed: `[rows, *packed_shape]`, int8.
        padded: the buffer, `[rows, padded_width]`, of any dtype; overwritten.
    """
    bits = bits_of(packed)
    if bits == 8:
        padded.copy_(packed.reshape(padded.shape))
    elif bits == 4:
        _unpack_nibbles(packed, padded)
    else:
        padded.copy_(_unsigned(packed).sub_(ZERO[bits]))


def _look_up_nibbles(packed: Tensor, padded: Tensor, values: Tensor) -> None:
    rows, width = packed.shape
    halves = padded.view(rows, width // HALF, 2, HALF)
    nibble = torch.arange(256, device=packed.device)
    place = packed.view(torch.uint8).view(-1).int()
    for half, table in enumerate((values[nibble & 0x0F], values[nibble >> 4])):
        halves[:, :, half].copy_(table.index_select(0, place).view(rows, width // HALF, HALF))


def _unpack_nibbles(packed: Tensor, padded: Tensor) -> None:
    rows, width = packed.shape
    halves = padded.view(rows, width // HALF, 2, HALF)
    blocks = packed.view(rows, width // HALF, HALF)
    # Contiguous temporaries of a byte a code: writing results into the halves would not vectorise.
    halves[:, :, 0].copy_((blocks & 0x0F).add_(LOWEST))
    high = blocks.view(torch.uint8) >> 4  # unsigned: a signed shift would copy the top bit
    halves[:, :, 1].copy_(high.view(torch.int8).add_(LOWEST))


EACH_BYTE = 0x0101010101010101
"""Multiplied by a mask of one byte: that mask in each byte of a 64-bit word."""


def _unsigned(packed: Tensor) -> Tensor:
    """The stored (unsigned) number of each code of packed rows of 3 or 8 bits: int8, `[rows, codes]`.

    Eight codes at a time: a field of f bits is f words of 64 bits, and a plane of it is one shift and one
    mask for each word; bits that a shift takes into the next byte are masked. (By bytes: 2.6 times as long.)
    """
    rows, blocks, _ = packed.shape
    words, done = packed.view(torch.int64), 0
    fields: list[Tensor] = []
    for field in FIELDS[bits_of(packed)]:
        shifts = torch.arange(0, 8, field, device=packed.device).unsqueeze(1)  # of the planes
        planes = (words[:, :, None, done : done + field] >> shifts) & (EACH_BYTE * (2**field - 1))
        fields.append(planes.reshape(rows, blocks, 8) << done)
        done += field
    return reduce(or_, fields).view(torch.int8).view(rows, BLOCK * blocks)
