"""Triton kernels that compute from the stored bytes: products with few tokens and with tiles, dense rows.

A row is blocks of 64 codes in two halves of 32 columns; every kernel goes through blocks and halves. Levels
and activations are exact in their products: an activation times its column's scale is cut into bfloat16
terms, and a group's scale multiplies the FP32 sum of its 32 columns, never a level. Row scale, salient
entries and bias come last, in the program that owns the rows, so nothing is added by atomics and each run
gives the same bits. A stack of experts is one matrix of all their rows. Not here: what the bytes mean
(`kernels.triton.decoding`), grids, shapes and which kernel runs (`kernels.triton.launch`).
"""

import triton
import triton.language as tl

from svdq_hf.kernels.triton.decoding import entries_before, levels_of, scale_at, table_of


@triton.jit
def activations(x, weight, token, column, expert, sizes):
    """Activations times their column's scale, FP32; zero where token is -1 or column beyond the last."""
    inside = column < sizes.in_features
    place = token.to(tl.int64) * sizes.in_features + column
    found = tl.load(x + place, mask=(token >= 0) & inside, other=0.0).to(tl.float32)
    if weight.column_scale is not None:
        scale = weight.column_scale + (expert * sizes.in_features + column)
        found *= tl.load(scale, mask=inside, other=0.0).to(tl.float32)
    return found


@triton.jit
def stretch(sizes, PLAN: tl.constexpr):
    """First block of this program's part of the columns, and the one after its last."""
    blocks = tl.cdiv(sizes.in_features, 64)
    each = tl.cdiv(tl.cdiv(blocks, PLAN.blocks), PLAN.splits) * PLAN.blocks
    first = tl.program_id(1) * each
    return first, tl.minimum(first + each, blocks)


@triton.jit
def add_salient(total, x, salient, at, sizes):
    """Sums [tokens, rows] plus the products of the rows' salient entries, sixteen entries at a time."""
    token, row, expert = at
    mine = expert * sizes.k
    start = mine + entries_before(salient.row + mine, sizes.k, tl.min(row, 0))
    stop = mine + entries_before(salient.row + mine, sizes.k, tl.max(row, 0) + 1)
    for chunk in range(start, stop, 16):
        entry = chunk + tl.arange(0, 16)
        column = tl.load(salient.column + entry, mask=entry < stop, other=-1)
        there = (column >= 0) & (column < sizes.in_features)
        value = tl.load(salient.value + entry, mask=there, other=0.0)
        own = tl.load(salient.row + entry, mask=there, other=-1)
        place = token.to(tl.int64)[:, None] * sizes.in_features + column[None, :]
        inputs = tl.load(x + place, mask=(token >= 0)[:, None] & there[None, :], other=0.0).to(tl.float32)
        product = inputs * value[None, :]
        if total.shape[0] >= 16:
            chosen = (own[:, None] == row[None, :]).to(tl.float32)
            total = tl.dot(product, chosen, total, input_precision="ieee")
        else:
            chosen = own[None, None, :] == row[None, :, None]
            total += tl.sum(tl.where(chosen, product[:, None, :], 0.0), 2)
    return total


@triton.jit
def finish(total, io, weight, salient, at, sizes):
    """Sums [tokens, rows] times the row's scale, plus salient entries and bias, into y."""
    token, row, expert = at
    inside = row < sizes.out
    if weight.row_scale is not None:
        scale = weight.row_scale + (expert * sizes.out + row)
        total *= tl.load(scale, mask=inside, other=0.0).to(tl.float32)[None, :]
    if salient.value is not None:
        total = add_salient(total, io.x, salient, (token, row, expert), sizes)
    if weight.bias is not None:
        total += tl.load(weight.bias + row, mask=inside, other=0.0).to(tl.float32)[None, :]
    place = token.to(tl.int64)[:, None] * sizes.out + row[None, :]
    there = (token >= 0)[:, None] & inside[None, :]
    tl.store(io.y + place, total.to(io.y.dtype.element_ty), mask=there)


@triton.jit
def put(total, io, weight, salient, at, sizes):
    """Sums [tokens, rows] into y, or, of a part of the columns, into sums."""
    if io.sums is None:
        finish(total, io, weight, salient, at, sizes)
    else:
        token, row, _ = at
        place = (tl.program_id(1) * sizes.tokens + token)[:, None] * sizes.out + row[None, :]
        tl.store(io.sums + place, total, mask=(token >= 0)[:, None] & (row < sizes.out)[None, :])


@triton.jit
def multiply_few(io, weight, salient, sizes, PLAN: tl.constexpr):
    """A few tokens times a tile of rows, without tensor cores. Grid: tiles of rows, splits."""
    TOKENS: tl.constexpr = PLAN.tokens
    ROWS: tl.constexpr = PLAN.rows
    BLOCKS: tl.constexpr = PLAN.blocks
    token = tl.arange(0, TOKENS)
    token = tl.where(token < sizes.tokens, token, -1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    near = tl.minimum(row, sizes.out - 1)[:, None]
    table, blocks = table_of(weight, 0, PLAN), tl.cdiv(sizes.in_features, 64)
    bytes_of_row = weight.codes + near.to(tl.int64) * (blocks * (8 * PLAN.bits))
    first, last = stretch(sizes, PLAN)
    total = tl.zeros([TOKENS, ROWS, BLOCKS], tl.float32)
    for start in range(first, last, BLOCKS):
        block = start + tl.arange(0, BLOCKS)[None, :]
        place = bytes_of_row + tl.minimum(block, blocks - 1) * (8 * PLAN.bits)
        for half in tl.static_range(2):
            begin = 64 * block + 32 * half
            column = begin[:, :, None] + tl.arange(0, 32)[None, None, :]
            level = levels_of(place[:, :, None], half, table, PLAN)
            inputs = activations(io.x, weight, token[:, None, None, None], column[None], 0, sizes)
            if PLAN.group > 0 and PLAN.group < 32:
                level *= scale_at(weight, near[:, :, None], column, 0, sizes, PLAN)
                total += tl.sum(inputs * level[None], 3)
            else:
                scale = scale_at(weight, near, begin, 0, sizes, PLAN)
                total += tl.sum(inputs * level[None], 3) * scale[None]
    put(tl.sum(total, 2), io, weight, salient, (token, row, 0), sizes)


@triton.jit
def product(inputs, level, PLAN: tl.constexpr):
    """Inputs [tokens, 32] @ level [rows, 32].T, exact but for the FP32 sum, by tensor cores."""
    TOKENS: tl.constexpr = PLAN.tokens
    TERMS: tl.constexpr = PLAN.terms
    ROWS: tl.constexpr = PLAN.rows
    right = tl.trans(level.to(tl.bfloat16).to(PLAN.operand))
    total = tl.zeros([TOKENS, ROWS], tl.float32)
    for _ in tl.static_range(TERMS):
        term = inputs.to(tl.bfloat16)
        total = tl.dot(term.to(PLAN.operand), right, total)
        inputs -= term.to(tl.float32)
    return total


@triton.jit
def multiply_tile(io, weight, salient, sizes, PLAN: tl.constexpr):
    """A tile of tokens times a tile of rows. Grid: tiles of rows, splits, tiles of tokens."""
    TOKENS: tl.constexpr = PLAN.tokens
    ROWS: tl.constexpr = PLAN.rows
    tile, expert, start, stop = tl.program_id(2), 0, 0, sizes.tokens
    if io.ends is not None:
        every = tl.arange(0, PLAN.experts)
        end = tl.load(io.ends + every, mask=every < sizes.experts, other=0).to(tl.int32)
        begin = tl.load(io.ends + every - 1, mask=(every > 0) & (every < sizes.experts), other=0).to(tl.int32)
        begin, end = tl.maximum(begin, 0), tl.minimum(end, sizes.tokens)
        tiles = tl.maximum(tl.cdiv(end - begin, TOKENS), 0)
        last = tl.cumsum(tiles, 0)
        expert = tl.sum((last <= tile).to(tl.int32), 0)
        if expert >= PLAN.experts:
            return
        start = tl.sum(tl.where(every == expert, begin, 0), 0)
        stop = tl.sum(tl.where(every == expert, end, 0), 0)
        tile -= tl.sum(tl.where(every == expert, last - tiles, 0), 0)
    token = start + tile * TOKENS + tl.arange(0, TOKENS)
    token = tl.where(token < stop, token, -1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    near = expert * sizes.out + tl.minimum(row, sizes.out - 1)
    table, blocks = table_of(weight, expert, PLAN), tl.cdiv(sizes.in_features, 64)
    bytes_of_row = weight.codes + near.to(tl.int64)[:, None] * (blocks * (8 * PLAN.bits))
    first, last = stretch(sizes, PLAN)
    total = tl.zeros([TOKENS, ROWS], tl.float32)
    for block in range(first, last):
        for half in tl.static_range(2):
            column = 64 * block + 32 * half + tl.arange(0, 32)[None, :]
            level = levels_of(bytes_of_row + block * (8 * PLAN.bits), half, table, PLAN)
            inputs = activations(io.x, weight, token[:, None], column, expert, sizes)
            if PLAN.group > 0 and PLAN.group < 32:
                level *= scale_at(weight, near[:, None], column, expert, sizes, PLAN)
                total = tl.dot(inputs, tl.trans(level), total, input_precision="ieee")
            else:
                scale = scale_at(weight, near, 64 * block + 32 * half, expert, sizes, PLAN)
                total += product(inputs, level, PLAN) * scale[None, :]
    put(total, io, weight, salient, (token, row, expert), sizes)


@triton.jit
def add_splits(io, weight, salient, sizes, PLAN: tl.constexpr):
    """The partial sums of all splits, in their order. Grid: tiles of rows, -, tiles of tokens."""
    TOKENS: tl.constexpr = PLAN.tokens
    ROWS: tl.constexpr = PLAN.rows
    token = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    token = tl.where(token < sizes.tokens, token, -1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = (token >= 0)[:, None] & (row < sizes.out)[None, :]
    total = tl.zeros([TOKENS, ROWS], tl.float32)
    for split in range(PLAN.splits):
        place = (split * sizes.tokens + token)[:, None] * sizes.out + row[None, :]
        total += tl.load(io.sums + place, mask=there, other=0.0)
    finish(total, io, weight, salient, (token, row, 0), sizes)


@triton.jit
def dequantize(io, weight, salient, sizes, window, PLAN: tl.constexpr):
    """A window of the weight, dense, into io.y. Grid: tiles of rows, tiles of columns.

    With io.x, numbers of rows, those rows, one in each tile.
    """
    place = tl.program_id(0) * PLAN.rows
    start = window.row + place if io.x is None else tl.load(io.x + place).to(tl.int32)
    each = tl.arange(0, PLAN.rows)[:, None]
    near = tl.minimum(start + each, sizes.out - 1)
    to = io.y + (place + each).to(tl.int64) * window.columns
    stride = tl.cdiv(sizes.in_features, 64) * (8 * PLAN.bits)
    left = window.column + tl.program_id(1) * (64 * PLAN.blocks)
    for half in tl.static_range(2):
        begin = left + 32 * half + 64 * tl.arange(0, PLAN.blocks)[None, :]
        column = begin[:, :, None] + tl.arange(0, 32)[None, None, :]
        inside = (column < window.column + window.columns) & ((place + each) < window.rows)[:, :, None]
        block = tl.minimum(begin // 64 * (8 * PLAN.bits), stride - 8 * PLAN.bits)
        first_byte = weight.codes + near.to(tl.int64) * stride + block
        level = levels_of(first_byte[:, :, None], half, table_of(weight, 0, PLAN), PLAN)
        scale = scale_at(weight, near[:, :, None], column, 0, sizes, PLAN)
        if weight.row_scale is not None:
            scale *= tl.load(weight.row_scale + near).to(tl.float32)[:, :, None]
        level *= scale
        if weight.column_scale is not None:
            level *= tl.load(weight.column_scale + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(to[:, :, None] + (column - window.column), level.to(io.y.dtype.element_ty), mask=inside)
    if salient.value is not None:
        tl.debug_barrier()  # the entries replace what other threads of this program have stored
        rows = tl.minimum(PLAN.rows, window.rows - place)
        right = tl.minimum(left + 64 * PLAN.blocks, window.column + window.columns)
        first = entries_before(salient.row, sizes.k, start)
        stop = entries_before(salient.row, sizes.k, start + rows)
        for chunk in range(first, stop, 16):
            entry = chunk + tl.arange(0, 16)
            own = tl.load(salient.row + entry, mask=entry < stop, other=-1) - start
            at = tl.load(salient.column + entry, mask=entry < stop, other=-1)
            value = tl.load(salient.value + entry, mask=entry < stop, other=0.0)
            there = (own >= 0) & (own < rows) & (at >= left) & (at < right)
            spot = (place + own).to(tl.int64) * window.columns + (at - window.column)
            tl.store(io.y + spot, value.to(io.y.dtype.element_ty), mask=there)
