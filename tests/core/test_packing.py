import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from svdq_hf.core.packing import (
    BLOCK,
    HALF,
    RANGES,
    bits_of,
    look_up_into,
    pack,
    packed_shape,
    packed_width,
    padded_width,
    unpack,
    unpack_into,
)

SHAPES = st.tuples(st.integers(1, 4), st.integers(1, 200))


def codes_of(bits):
    return arrays(np.int8, SHAPES, elements=st.integers(*RANGES[bits])).map(torch.from_numpy)


CODES = codes_of(4)
OF_ANY_BITS = st.sampled_from(list(RANGES)).flatmap(lambda bits: st.tuples(st.just(bits), codes_of(bits)))
every_bits = pytest.mark.parametrize("bits", RANGES)


@pytest.mark.parametrize(
    ("in_features", "width"), [(0, 0), (1, 32), (63, 32), (64, 32), (65, 64), (128, 64), (129, 96)]
)
def test_a_row_takes_32_bytes_per_started_block_of_64(in_features, width):
    assert packed_width(in_features) == width


@given(OF_ANY_BITS)
def test_unpack_returns_what_pack_was_given(case):
    bits, codes = case
    packed = pack(codes, bits)
    assert packed.dtype == torch.int8
    assert packed.is_contiguous()
    assert packed.shape == (codes.shape[0], *packed_shape(codes.shape[1], bits))
    assert bits_of(packed) == bits
    assert torch.equal(unpack(packed, codes.shape[1]), codes)


@every_bits
def test_a_packed_row_has_so_many_bits_a_code_and_not_the_shape_of_a_dense_one(bits):
    for in_features in range(1, 200):
        shape = packed_shape(in_features, bits)
        assert 8 * np.prod(shape) == bits * BLOCK * -(-in_features // BLOCK)
        # 4 bits of 32 columns are 32 bytes: a file of version 1 or 2, which cannot change any more
        assert shape != (in_features,) or (bits, in_features) == (4, 32)


@given(codes_of(3))
def test_3_bits_are_two_low_bits_in_four_planes_of_16_and_a_top_bit_in_eight_of_8(codes):
    packed = pack(codes, 3).view(torch.uint8).tolist()
    for row, values in enumerate(codes.tolist()):
        for column in range(BLOCK * len(packed[row])):
            block, i = divmod(column, BLOCK)
            low = packed[row][block][i % 16] // 4 ** (i // 16) % 4
            top = packed[row][block][16 + i % 8] // 2 ** (i // 8) % 2
            expected = values[column] if column < len(values) else 0
            assert low + 4 * top == expected + 4


@given(codes_of(8))
def test_8_bits_are_the_codes_and_zeros(codes):
    flat = pack(codes, 8).flatten(1)
    assert torch.equal(flat[:, : codes.shape[1]], codes)
    assert not flat[:, codes.shape[1] :].any()


@given(OF_ANY_BITS, st.sampled_from([torch.float32, torch.bfloat16, torch.int8]))
def test_unpacking_into_a_buffer_of_any_dtype_has_zeros_in_the_padding(case, dtype):
    bits, codes = case
    packed = pack(codes, bits)
    padded = torch.full((codes.shape[0], padded_width(packed)), 99, dtype=dtype)
    unpack_into(packed, padded)
    assert torch.equal(padded[:, : codes.shape[1]].to(torch.int8), codes)
    assert not padded[:, codes.shape[1] :].any()


@given(OF_ANY_BITS.filter(lambda case: case[0] != 8))
def test_looking_up_gives_the_level_of_each_code(case):
    bits, codes = case
    packed = pack(codes, bits)
    levels = torch.arange(-60, 61, 4, dtype=torch.int8)[: 2**bits]
    padded = torch.empty(codes.shape[0], padded_width(packed))
    look_up_into(packed, padded, levels)
    expected = levels[codes.long() + 2 ** (bits - 1)].float()
    assert torch.equal(padded[:, : codes.shape[1]], expected)
    assert (padded[:, codes.shape[1] :] == levels[2 ** (bits - 1)]).all()


@given(CODES)
def test_byte_i_holds_code_i_low_and_code_i_plus_32_high(codes):
    out, in_features = codes.shape
    packed = pack(codes).view(torch.uint8).tolist()
    for row in range(out):
        for column in range(2 * packed_width(in_features)):
            block, i = divmod(column, BLOCK)
            byte = packed[row][HALF * block + i % HALF]
            nibble = byte % 16 if i < HALF else byte // 16
            expected = int(codes[row, column]) if column < in_features else 0
            assert nibble == expected + 8


@given(CODES)
def test_padding_nibbles_are_8(codes):
    packed = pack(codes)
    padded = torch.empty(codes.shape[0], 2 * packed.shape[1], dtype=torch.int8)
    unpack_into(packed, padded)
    assert torch.equal(padded[:, : codes.shape[1]], codes)
    assert (padded[:, codes.shape[1] :] == 0).all()


@given(OF_ANY_BITS, st.data())
def test_a_row_slice_of_packed_is_the_packed_row_slice(case, data):
    bits, codes = case
    start = data.draw(st.integers(0, codes.shape[0] - 1))
    stop = data.draw(st.integers(start + 1, codes.shape[0]))
    part = pack(codes, bits)[start:stop]
    assert torch.equal(part, pack(codes[start:stop], bits))
    assert torch.equal(unpack(part, codes.shape[1]), codes[start:stop])


def test_every_byte_is_a_pair_of_codes(device):
    every = torch.arange(256, dtype=torch.uint8, device=device).view(torch.int8).view(2, 128)
    assert torch.equal(pack(unpack(every, 256)), every)


def test_all_bytes_are_codes_of_3_bits(device):
    every = torch.randint(-128, 128, (50, 4, 24), dtype=torch.int8, device=device)
    assert torch.equal(pack(unpack(every, 256), 3), every)


@every_bits
def test_pack_leaves_its_input_as_it_is(bits):
    codes = torch.full((2, 64), RANGES[bits][0], dtype=torch.int8)
    pack(codes, bits)
    assert (codes == RANGES[bits][0]).all()


@every_bits
def test_codes_of_a_transposed_layout_pack_the_same(bits):
    lowest, highest = RANGES[bits]
    for columns in (70, 64):
        codes = torch.randint(lowest, highest + 1, (columns, 6), dtype=torch.int8).T
        assert torch.equal(pack(codes, bits), pack(codes.contiguous(), bits))


@pytest.mark.parametrize("bits", [3, 8])
def test_no_rows_of_other_bits_are_no_rows(bits):
    assert pack(torch.zeros(0, 70, dtype=torch.int8), bits).shape == (0, 2, 8 * bits)
    assert unpack(torch.zeros(0, 2, 8 * bits, dtype=torch.int8), 70).shape == (0, 70)


def test_no_rows_are_no_rows():
    assert pack(torch.zeros(0, 70, dtype=torch.int8)).shape == (0, 64)
    assert unpack(torch.zeros(0, 64, dtype=torch.int8), 70).shape == (0, 70)
