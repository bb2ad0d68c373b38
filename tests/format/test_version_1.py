"""Format version 1, byte for byte: a file written once, its bytes derived by hand.

The file `golden/format_v1.safetensors` was written once, by version 0.1.0, and is never written
again. How:

    from safetensors.torch import save_file
    tensors = {
        f"{name}.{part}": tensor
        for name, config in CONFIGS.items()
        for part, tensor in today(name, config).items()
    }
    save_file(tensors, GOLDEN, metadata={"format": "pt"})
"""

import pytest
import torch
from golden_v1 import CONFIGS, GOLDEN, IN, OUT, K, weight
from safetensors.torch import load_file

from svdq_hf.config import SVDQConfig
from svdq_hf.core.topk import top_positions
from svdq_hf.format.checks import check_parts
from svdq_hf.format.decode import reconstruct
from svdq_hf.format.encode import decompose
from svdq_hf.format.versions import FORMAT_VERSION
from svdq_hf.nn.linear import SVDQLinear

PARTS = ["weight", "weight_scale", "salient_values", "salient_rows", "salient_columns"]

every_config = pytest.mark.parametrize("name", CONFIGS)


def today(name, config):
    scheme = SVDQConfig.from_dict(config).scheme
    dense = weight(name)
    return decompose(dense, *top_positions(dense.abs(), K), scheme)


def golden(name):
    return {part: load_file(GOLDEN)[f"{name}.{part}"] for part in PARTS}


def test_a_version_5_gets_a_golden_file_of_its_own():
    assert FORMAT_VERSION == 4  # test_version_2.py, test_version_3.py, test_version_4_experts.py


@every_config
def test_these_choices_are_still_written_as_version_1(name):
    assert SVDQConfig.from_dict(CONFIGS[name]).format_version == 1


def test_the_file_holds_these_tensors_and_no_others():
    found = {key: (list(tensor.shape), tensor.dtype) for key, tensor in load_file(GOLDEN).items()}
    assert found == {
        "groups.weight": ([3, 64], torch.int8),
        "groups.weight_scale": ([3, 2], torch.bfloat16),
        "groups.salient_values": ([2], torch.float32),
        "groups.salient_rows": ([2], torch.int32),
        "groups.salient_columns": ([2], torch.int32),
        "tensor.weight": ([3, 64], torch.int8),
        "tensor.weight_scale": ([1, 1], torch.float32),
        "tensor.salient_values": ([2], torch.float32),
        "tensor.salient_rows": ([2], torch.int32),
        "tensor.salient_columns": ([2], torch.int32),
    }


@every_config
def test_the_same_weights_decompose_into_the_same_tensors_today(name):
    parts = today(name, CONFIGS[name])
    assert list(parts) == PARTS
    for part, stored in golden(name).items():
        assert parts[part].dtype == stored.dtype, part
        assert torch.equal(parts[part], stored), part


def test_the_bytes_of_the_first_row_are_those_derived_by_hand():
    # Block 1, columns 0..63. The nibble (code + 8) of column c is c % 16 for c < 32 and (c + 1) % 16
    # after. Byte i holds column i low and column i + 32 high: low i % 16, high (i + 1) % 16.
    # So 0x10, 0x21, ..., 0xFE, 0x0F and the same again. But byte 8 holds column 40 high, which is
    # salient: its code is zero, nibble 8, and the byte 0x88 instead of 0x98.
    # Block 2, columns 64..69: nibbles 0..5 low. High are columns 96..101, which are padding, code
    # zero, nibble 8. The rest of the block is padding on both sides: 0x88.
    # fmt: off
    by_hand = [
        0x10, 0x21, 0x32, 0x43, 0x54, 0x65, 0x76, 0x87, 0x88, 0xA9, 0xBA, 0xCB, 0xDC, 0xED, 0xFE, 0x0F,
        0x10, 0x21, 0x32, 0x43, 0x54, 0x65, 0x76, 0x87, 0x98, 0xA9, 0xBA, 0xCB, 0xDC, 0xED, 0xFE, 0x0F,
        0x80, 0x81, 0x82, 0x83, 0x84, 0x85, 0x88, 0x88, 0x88, 0x88, 0x88, 0x88, 0x88, 0x88, 0x88, 0x88,
        0x88, 0x88, 0x88, 0x88, 0x88, 0x88, 0x88, 0x88, 0x88, 0x88, 0x88, 0x88, 0x88, 0x88, 0x88, 0x88,
    ]
    # fmt: on
    assert golden("groups")["weight"][0].view(torch.uint8).tolist() == by_hand
    # Clamped to -7 the nibble 0 becomes 1, wherever it is: in bytes 0 and 16 (low), 15 and 31 (high)
    # of block 1, and in byte 0 of block 2.
    clamped = list(by_hand)
    clamped[0] = clamped[16] = 0x11
    clamped[15] = clamped[31] = 0x1F
    clamped[32] = 0x81
    assert golden("tensor")["weight"][0].view(torch.uint8).tolist() == clamped


def test_scales_and_salient_parts_are_those_derived_by_hand():
    groups, tensor = golden("groups"), golden("tensor")
    # 2 ** -(3 + row + group).
    assert groups["weight_scale"].tolist() == [[1 / 8, 1 / 16], [1 / 16, 1 / 32], [1 / 32, 1 / 64]]
    assert tensor["weight_scale"].tolist() == [[1 / 8]]  # the largest, 7 / 8, over 7
    for parts in (groups, tensor):
        assert parts["salient_values"].tolist() == [100.25, -3000.0]
        assert parts["salient_rows"].tolist() == [0, 2]
        assert parts["salient_columns"].tolist() == [40, 69]


def test_the_file_reconstructs_to_literal_values():
    dense = reconstruct(golden("groups"), IN, SVDQConfig.from_dict(CONFIGS["groups"]).scheme)
    assert dense[0, :4].tolist() == [-1.0, -0.875, -0.75, -0.625]  # codes -8, -7, -6, -5 over 8
    assert dense[0, 38:43].tolist() == [-0.125, 0.0, 100.25, 0.25, 0.375]  # codes -1, 0, (1), 2, 3
    assert dense[0, 64:].tolist() == [-0.5, -0.4375, -0.375, -0.3125, -0.25, -0.1875]  # -8..-3 over 16
    # Codes -8, -5, -2, 1, 4, 7 over 32, and -8, -3, 2, 7, -4, (1) over 64.
    assert dense[1, 64:].tolist() == [-0.25, -0.15625, -0.0625, 0.03125, 0.125, 0.21875]
    assert dense[2, 64:].tolist() == [-0.125, -0.046875, 0.03125, 0.109375, -0.0625, -3000.0]
    assert torch.equal(dense, weight("groups"))


@every_config
def test_the_file_passes_the_checks_and_stands_for_the_weight(name):
    scheme = SVDQConfig.from_dict(CONFIGS[name]).scheme
    check_parts(golden(name), IN, scheme)
    assert torch.equal(reconstruct(golden(name), IN, scheme), weight(name))


@every_config
def test_a_layer_loads_the_file_and_computes_with_it(name, device):
    layer = SVDQLinear(IN, OUT, SVDQConfig.from_dict(CONFIGS[name]).scheme, bias=False, device=device)
    layer.load_state_dict(golden(name), strict=True)
    # One column at a time: products with one and with zeros, exact in float32.
    assert torch.equal(layer(torch.eye(IN, device=device)).cpu(), weight(name).T)
