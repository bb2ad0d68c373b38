"""Format version 3, byte for byte: codes of 3 and of 8 bits, derived by hand.

The file `golden/format_v3.safetensors` was written once, by version 0.1.0, and is never written
again; how, `test_version_1.py` says.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from svdq_hf.config import SVDQConfig
from svdq_hf.format.checks import check_parts
from svdq_hf.format.decode import reconstruct
from svdq_hf.format.encode import decompose
from svdq_hf.nn.linear import SVDQLinear

GOLDEN = Path(__file__).parent / "golden" / "format_v3.safetensors"
OUT, IN, K = 3, 70, 2
LEVELS = [-127, -80, -49, -23, 0, 27, 57, 97]

# As config.json of a model of version 3 holds them; never to be changed.
STORED = {
    "quant_method": "svdq", "format_version": 3, "k": K, "rank": 8, "saliency": "magnitude",
    "scale": "mse", "column_scale": False, "scale_bits": 16,
}  # fmt: skip
CONFIGS = {
    "three": STORED | {"bits": 3, "levels": "normal", "group_size": 32},
    "eight": STORED | {"bits": 8, "levels": "linear", "group_size": 64},
}
every_config = pytest.mark.parametrize("name", CONFIGS)


def code(name, row, column):
    """Every group has the largest level, so that no other codes are proportional to its own."""
    if name == "three":
        return (column * (2 * row + 1) + column // 16) % 8 - 4
    return 127 - 4 * (column * (2 * row + 1) % 64)


def scale(name, row, column):
    """Powers of two; of 3 bits negative: the largest weight has the sign of which there is one code more."""
    size = 2.0 ** -(3 + row + column // 64)
    return -size if name == "three" else size


def weight(name):
    """All exact in few bits, and two large entries that are not."""
    values = [
        [
            scale(name, r, c) * (LEVELS[code(name, r, c) + 4] if name == "three" else code(name, r, c))
            for c in range(IN)
        ]
        for r in range(OUT)
    ]
    values[0][40], values[2][69] = 100.25, -3000.0
    return torch.tensor(values)


def scheme(name):
    return SVDQConfig.from_dict(CONFIGS[name]).scheme


def today(name):
    dense = weight(name)
    rows = torch.tensor([0, 2], dtype=torch.int32)
    return decompose(dense, rows, torch.tensor([40, 69], dtype=torch.int32), scheme(name))


def golden(name):
    prefix = f"{name}."
    return {key[len(prefix) :]: part for key, part in load_file(GOLDEN).items() if key.startswith(prefix)}


@every_config
def test_these_choices_are_written_as_version_3(name):
    assert SVDQConfig.from_dict(CONFIGS[name]).format_version == 3


def test_the_file_holds_these_tensors_and_no_others():
    found = {key: (list(tensor.shape), tensor.dtype) for key, tensor in load_file(GOLDEN).items()}
    salient = {"values": torch.float32, "rows": torch.int32, "columns": torch.int32}
    assert found == {
        "three.weight": ([3, 2, 24], torch.int8),
        "three.weight_scale": ([3, 3], torch.bfloat16),
        "three.levels": ([8], torch.int8),
        "eight.weight": ([3, 2, 64], torch.int8),
        "eight.weight_scale": ([3, 2], torch.bfloat16),
        **{f"{name}.salient_{part}": ([2], dtype) for name in CONFIGS for part, dtype in salient.items()},
    }


@every_config
def test_the_same_weights_decompose_into_the_same_tensors_today(name):
    parts = today(name)
    assert parts.keys() == golden(name).keys()
    for part, stored in golden(name).items():
        assert parts[part].dtype == stored.dtype, part
        assert torch.equal(parts[part], stored), part


def test_the_bytes_of_the_first_row_of_3_bits_are_those_derived_by_hand():
    # What is stored is code + 4 = (c + c // 16) % 8 for column c. Byte i of the first sixteen holds the low
    # two bits of columns i, i + 16, i + 32 and i + 48: i, i + 1, i + 2 and i + 3, modulo 4. So 0xE4 (0, 1,
    # 2, 3 from the lowest bits on), 0x39, 0x4E, 0x93 and again; but column 40, the third of byte 8, is
    # salient: code zero, stored as 4, low bits 0.
    # fmt: off
    low = [
        0xE4, 0x39, 0x4E, 0x93, 0xE4, 0x39, 0x4E, 0x93, 0xC4, 0x39, 0x4E, 0x93, 0xE4, 0x39, 0x4E, 0x93,
    ]
    # fmt: on
    # Byte 16 + j holds the top bits of columns j, j + 8, ..., j + 56: whether (j + p // 2) % 8 is 4 or more,
    # for p from 0 to 7. Of j = 0 none is, but for column 40 (p = 5).
    top = [0x20, 0xC0, 0xF0, 0xFC, 0xFF, 0x3F, 0x0F, 0x03]
    # Block 2, columns 64..69: 4, 5, 6, 7, 0, 1; and padding, code zero, 4: low bits 0, top bit 1.
    second = [0, 1, 2, 3, 0, 1] + [0] * 10 + [0xFF] * 4 + [0xFE] * 2 + [0xFF] * 2
    assert golden("three")["weight"][0].view(torch.uint8).tolist() == [low + top, second]


def test_the_bytes_of_the_first_row_of_8_bits_are_its_codes():
    codes = golden("eight")["weight"][0].flatten()
    by_hand = [127 - 4 * column for column in range(64)] + [127, 123, 119, 115, 111, 107] + [0] * 58
    by_hand[40] = 0  # salient
    assert codes.tolist() == by_hand


@every_config
def test_the_file_stands_for_the_weight_and_for_what_its_bytes_say(name, dense_by_hand):
    group = CONFIGS[name]["group_size"]
    check_parts(golden(name), IN, scheme(name))
    assert torch.equal(reconstruct(golden(name), IN, scheme(name)), weight(name))
    by_hand = dense_by_hand(golden(name), IN, group)
    assert torch.equal(torch.from_numpy(by_hand), weight(name).double())


def test_the_file_reconstructs_to_literal_values():
    three, eight = (reconstruct(golden(name), IN, scheme(name)) for name in CONFIGS)
    assert three[0, :4].tolist() == [127 / 8, 80 / 8, 49 / 8, 23 / 8]  # codes -4, -3, -2, -1, scale -1/8
    assert three[0, 38:43].tolist() == [127 / 8, 80 / 8, 100.25, 23 / 8, 0.0]  # codes -4, -3, (0), -1, 0
    assert three[0, 64:66].tolist() == [0.0, -27 / 16]  # codes 0, 1, scale -1/16
    assert eight[0, :3].tolist() == [127 / 8, 123 / 8, 119 / 8]
    assert eight[2, 67:].tolist() == [67 / 64, 47 / 64, -3000.0]


@every_config
def test_a_layer_loads_the_file_and_computes_with_it(name, device):
    layer = SVDQLinear(IN, OUT, scheme(name), bias=False, device=device)
    layer.load_state_dict(golden(name), strict=True)
    # One column at a time: products with one and with zeros, exact in float32.
    assert torch.equal(layer(torch.eye(IN, device=device)).cpu(), weight(name).T)
