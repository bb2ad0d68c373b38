"""Decoding in Triton: a tile of stored bytes to levels, a row's group to its scale, a row to its entries.

The functions are inlined into the kernels (`kernels.triton.kernels`). A block is 64 columns; a tile has one
half of each of its blocks, 32 columns, so that no byte is shuffled. Not here: why bytes lie as they do
(`core.packing`).
"""

import triton
import triton.language as tl


@triton.jit
def table_of(weight, expert, PLAN: tl.constexpr):
    """The levels of all codes in words of four; None: codes are their own levels."""
    if weight.table is None:
        return None
    else:
        words = weight.table + expert * (2**PLAN.bits // 4)
        first, second = tl.load(words), tl.load(words + 1)
        if PLAN.bits == 3:
            return first, second
        else:
            return first, second, tl.load(words + 2), tl.load(words + 3)


@triton.jit
def levels_of(block, half: tl.constexpr, table, PLAN: tl.constexpr):
    """Levels [..., 32], FP32, of a half of blocks; block: pointers to their first bytes [..., 1]."""
    column = tl.arange(0, 32)
    if PLAN.bits == 8:
        level = tl.load(block + (32 * half + column))
    else:
        if PLAN.bits == 4:
            code = (tl.load(block + column).to(tl.int32) >> (4 * half)) & 15
        else:
            place = 32 * half + column
            low = (tl.load(block + place % 16).to(tl.int32) >> (place // 16 * 2)) & 3
            top = (tl.load(block + (16 + place % 8)).to(tl.int32) >> (place // 8)) & 1
            code = low + 4 * top
        if table is None:
            level = code - 2 ** (PLAN.bits - 1)
        else:
            odd = (code & 4) != 0
            word = tl.where(odd, table[1], table[0])
            if PLAN.bits == 4:
                word = tl.where(code >= 8, tl.where(odd, table[3], table[2]), word)
            level = (word >> (code % 4 * 8)).to(tl.int8)
    return level.to(tl.float32)


@triton.jit
def scale_at(weight, row, column, expert, sizes, PLAN: tl.constexpr):
    """Scale of a row's group that a column is in, FP32, without the row's own."""
    place = row.to(tl.int64) * 0 + column * 0
    if PLAN.group:
        last = tl.cdiv(sizes.in_features, PLAN.group) - 1
        place += row.to(tl.int64) * (last + 1) + tl.minimum(column // PLAN.group, last)
    elif PLAN.single:
        place += expert
    else:
        place += row
    return tl.load(weight.scale + place).to(tl.float32)


@triton.jit
def entries_before(rows, k, row):
    """How many of k sorted entries are of rows before a row: a search in 256 places at a time."""
    found, left = 0, k
    while left > 0:
        step = tl.cdiv(left, 256)
        place = step * tl.arange(1, 257) - 1  # in what is left: the last entry of each step
        before = tl.load(rows + found + place, mask=place < left, other=2**31 - 1) < row
        steps = tl.sum(before.to(tl.int32), 0)
        found += steps * step
        left = tl.minimum(left - steps * step, step - 1)
    return found
