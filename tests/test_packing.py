import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from svdq_hf.packing import BLOCK, HALF, HIGHEST, LOWEST, pack, packed_width, unpack, unpack_into

SHAPES = st.tuples(st.integers(1, 4), st.integers(1, 200))
CODES = arrays(np.int8, SHAPES, elements=st.integers(LOWEST, HIGHEST)).map(torch.from_numpy)


@pytest.mark.parametrize(
    ("in_features", "width"), [(0, 0), (1, 32), (63, 32), (64, 32), (65, 64), (128, 64), (129, 96)]
)
def test_a_row_takes_32_bytes_per_started_block_of_64(in_features, width):
    assert packed_width(in_features) == width


@given(CODES)
def test_unpack_returns_what_pack_was_given(codes):
    packed = pack(codes)
    assert packed.dtype == torch.int8
    assert packed.shape == (codes.shape[0], packed_width(codes.shape[1]))
    assert torch.equal(unpack(packed, codes.shape[1]), codes)


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


@given(CODES, st.data())
def test_a_row_slice_of_packed_is_the_packed_row_slice(codes, data):
    start = data.draw(st.integers(0, codes.shape[0] - 1))
    stop = data.draw(st.integers(start + 1, codes.shape[0]))
    assert torch.equal(pack(codes)[start:stop], pack(codes[start:stop]))


def test_every_byte_is_a_pair_of_codes(device):
    every = torch.arange(256, dtype=torch.uint8, device=device).view(torch.int8).view(2, 128)
    assert torch.equal(pack(unpack(every, 256)), every)


def test_pack_leaves_its_input_as_it_is():
    codes = torch.full((2, 64), -8, dtype=torch.int8)
    pack(codes)
    assert (codes == -8).all()


def test_codes_of_a_transposed_layout_pack_the_same():
    codes = torch.randint(LOWEST, HIGHEST + 1, (70, 6), dtype=torch.int8).T
    assert torch.equal(pack(codes), pack(codes.contiguous()))


def test_no_rows_are_no_rows():
    assert pack(torch.zeros(0, 70, dtype=torch.int8)).shape == (0, 64)
    assert unpack(torch.zeros(0, 64, dtype=torch.int8), 70).shape == (0, 70)
