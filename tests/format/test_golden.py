"""Every format version byte for byte: files written once, their bytes derived by hand.

A row of `ROWS` is one stored weight. The files in `golden/` were written once, by version 0.1.0, and are
never written again. How:

    from safetensors.torch import save_file
    rows = [row for row in ROWS.values() if row.file == FILE]
    tensors = {row.key(part): tensor for row in rows for part, tensor in today(row).items()}
    save_file(tensors, GOLDEN / f"{FILE}.safetensors", metadata={"format": "pt"})

Version 1: codes of 4 bits. 2: levels, a column scale, scales of 8 bits. 3: codes of 3 and of 8 bits.
4: k layer by layer, packed embeddings, stacks of experts. (5: `test_golden_activations.py`.)
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from svdq_hf.config import SVDQConfig
from svdq_hf.core.topk import top_positions
from svdq_hf.format.checks import check_parts
from svdq_hf.format.decode import reconstruct
from svdq_hf.format.encode import decompose
from svdq_hf.format.names import WeightName
from svdq_hf.format.parts import Scheme, part_specs
from svdq_hf.format.versions import FORMAT_VERSION
from svdq_hf.nn.embedding import SVDQEmbedding
from svdq_hf.nn.experts import SVDQExperts
from svdq_hf.nn.linear import SVDQLinear
from svdq_hf.quantize.weight import quantize_stack

GOLDEN = Path(__file__).parent / "golden"
OUT, IN = 3, 70
OUTLIERS = {(0, 40): 100.25, (2, 69): -3000.0}
"""By row and column: far too large for any grid here. They are the salient weights."""


def with_outliers(values: Any) -> Tensor:
    weight = torch.as_tensor(values)
    for position, value in OUTLIERS.items():
        weight[position] = value
    return weight


# Version 1: multiples of powers of two, all exact in 4 bits.


def nibble(row: int, column: int) -> int:
    """Row 0: 0..15 over and over, one ahead in columns 32..63. Rows 1 and 2 count in threes and fives."""
    return (column * (2 * row + 1) + (1 if 32 <= column < 64 else 0)) % 16


def weight_1(name: str) -> Tensor:
    """Every group has the code -8 and an odd one, so that no other codes are proportional to it."""

    def code(row: int, column: int) -> int:
        value = nibble(row, column) - 8
        return value if name == "groups" else max(value, -7)  # absmax does not use -8

    def scale(row: int, column: int) -> float:
        return 2.0 ** -(3 + row + column // 64) if name == "groups" else 2.0**-3

    return with_outliers([[code(r, c) * scale(r, c) for c in range(IN)] for r in range(OUT)])


# Version 2.

LEVELS_2 = [-127, -99, -76, -59, -44, -32, -20, -10, 0, 12, 24, 37, 51, 68, 89, 123]


def weight_2() -> Tensor:
    """Rows of sizes 1, 2 and 4, columns of sizes 1 and 8, every level used."""
    row, column = torch.arange(OUT).unsqueeze(1), torch.arange(IN)
    level = torch.tensor(LEVELS_2)[(5 * row + 3 * column) % 16]
    return with_outliers(level / 1024 * 2.0**row * torch.where(column % 2 == 0, 1.0, 8.0))


# Version 3: all exact in few bits.

LEVELS_3 = [-127, -80, -49, -23, 0, 27, 57, 97]


def weight_3(name: str) -> Tensor:
    """Every group has the largest level, so that no other codes are proportional to its own."""

    def code(row: int, column: int) -> int:
        if name == "three":
            return LEVELS_3[(column * (2 * row + 1) + column // 16) % 8]
        return 127 - 4 * (column * (2 * row + 1) % 64)

    def scale(row: int, column: int) -> float:
        """Of 3 bits negative: the largest weight has the sign of which there is one code more."""
        size = 2.0 ** -(3 + row + column // 64)
        return -size if name == "three" else size

    return with_outliers([[scale(r, c) * code(r, c) for c in range(IN)] for r in range(OUT)])


# Version 4: weights and bytes of version 1.


def weight_4(k: int) -> Tensor:
    """That of version 1; outliers that are not salient here are 0."""
    dense = weight_1("groups")
    for position in list(OUTLIERS)[: 2 - k]:
        dense[position] = 0
    return dense


def experts(size: float) -> Tensor:
    """Two experts: the layer of version 1 times `size`, and that doubled."""
    return torch.stack([weight_1("groups"), 2 * weight_1("groups")]) * size


# As config.json of a model of each version holds them; never to be changed.

STORED_1 = {
    "quant_method": "svdq", "format_version": 1, "bits": 4, "k": 2, "rank": 8, "saliency": "magnitude",
}  # fmt: skip
GROUPS = STORED_1 | {"group_size": 64, "scale": "mse"}
TENSOR = STORED_1 | {"group_size": "tensor", "scale": "absmax"}
STORED_2 = {
    "quant_method": "svdq", "format_version": 2, "bits": 4, "k": 2, "rank": 8, "saliency": "magnitude",
    "group_size": 32, "scale": "mse", "levels": "normal", "column_scale": True, "scale_bits": 8,
}  # fmt: skip
STORED_3 = {
    "quant_method": "svdq", "format_version": 3, "k": 2, "rank": 8, "saliency": "magnitude",
    "scale": "mse", "column_scale": False, "scale_bits": 16,
}  # fmt: skip
STORED_4 = {
    "quant_method": "svdq", "format_version": 4, "bits": 4, "k": 2, "rank": 8, "saliency": "magnitude",
    "group_size": 64, "scale": "mse", "levels": "linear", "column_scale": False, "scale_bits": 16,
    "embeddings": True, "target_bits": 31.0, "layer_k": {"one": 1, "none": 0},
}  # fmt: skip
EXPERTS = GROUPS | {"format_version": 4, "levels": "linear", "column_scale": False, "scale_bits": 16}


# The rows.

I8, I32, BF16, F32 = torch.int8, torch.int32, torch.bfloat16, torch.float32
Tensors = dict[str, tuple[list[int], torch.dtype]]


def salient(*shape: int) -> Tensors:
    return {
        "salient_values": ([*shape], F32),
        "salient_rows": ([*shape], I32),
        "salient_columns": ([*shape], I32),
    }


class Row(NamedTuple):
    """A stored weight.

    prefix: of its tensors' names in the file. layer: its name, by which `layer_k` knows it. weight: what it
    stands for, `[out, in]` or `[experts, out, in]`. tensors: of the file, in the order of the format's text.
    exact: nothing of the weight is lost.
    """

    version: int
    file: str
    prefix: str
    layer: str
    stored: dict[str, Any]
    weight: Tensor
    tensors: Tensors
    exact: bool = True

    @property
    def scheme(self) -> Scheme:
        return SVDQConfig.from_dict(self.stored).of_layer(self.layer).scheme

    def key(self, part: str) -> str:
        """A tensor's name in the file; codes of experts have the name of the weight that they stand for."""
        is_stack = part == "weight" and self.weight.ndim == 3
        return self.prefix.removesuffix("_") if is_stack else self.prefix + part


CODES_4 = {"weight": ([3, 64], I8)}
SCALES_64 = {"weight_scale": ([3, 2], BF16)}
STACK: Tensors = {"weight": ([2, 3, 64], I8), "weight_scale": ([2, 3, 2], BF16), **salient(2, 2)}

ROWS = {
    "groups": Row(
        1, "format_v1", "groups.", "groups", GROUPS, weight_1("groups"), CODES_4 | SCALES_64 | salient(2)
    ),
    "tensor": Row(
        1, "format_v1", "tensor.", "tensor", TENSOR, weight_1("tensor"),
        {**CODES_4, "weight_scale": ([1, 1], F32), **salient(2)},
    ),
    "normal": Row(
        2, "format_v2", "", "normal", STORED_2, weight_2(),
        {**CODES_4, "weight_scale": ([3, 3], I8), **salient(2),
         "column_scale": ([70], BF16), "levels": ([16], I8), "row_scale": ([3], BF16)},
        exact=False,
    ),
    "three": Row(
        3, "format_v3", "three.", "three", STORED_3 | {"bits": 3, "levels": "normal", "group_size": 32},
        weight_3("three"),
        {"weight": ([3, 2, 24], I8), "weight_scale": ([3, 3], BF16), **salient(2), "levels": ([8], I8)},
    ),
    "eight": Row(
        3, "format_v3", "eight.", "eight", STORED_3 | {"bits": 8, "levels": "linear", "group_size": 64},
        weight_3("eight"),
        {"weight": ([3, 2, 64], I8), **SCALES_64, **salient(2)},
    ),
    # k of the first two is in `layer_k`; the embedding is not named, and has the config's own.
    "one": Row(4, "format_v4", "one.", "one", STORED_4, weight_4(1), CODES_4 | SCALES_64 | salient(1)),
    "none": Row(4, "format_v4", "none.", "none", STORED_4, weight_4(0), CODES_4 | SCALES_64 | salient(0)),
    "table": Row(4, "format_v4", "table.", "table", STORED_4, weight_4(2), CODES_4 | SCALES_64 | salient(2)),
    **{
        matrix: Row(
            4, "format_v4_experts", f"mlp.experts.{matrix}_", matrix, EXPERTS, experts(size), STACK
        )
        for matrix, size in {"gate_up_proj": 1.0, "down_proj": 4.0}.items()
    },
}  # fmt: skip
STACKS = [name for name, row in ROWS.items() if row.weight.ndim == 3]
LAYERS = [name for name in ROWS if name not in STACKS]
FILES = sorted({row.file for row in ROWS.values()})

every_row = pytest.mark.parametrize("name", ROWS)
every_layer = pytest.mark.parametrize("name", LAYERS)
every_stack = pytest.mark.parametrize("name", STACKS)


def today(row: Row) -> dict[str, Tensor]:
    if row.weight.ndim == 3:
        return quantize_stack(row.weight, SVDQConfig.from_dict(row.stored), row.layer)[0]
    return decompose(row.weight, *top_positions(row.weight.abs(), int(row.scheme.k)), row.scheme)


def contents(file: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / f"{file}.safetensors")


def golden(name: str) -> dict[str, Tensor]:
    """The stored parts of a row, from its file."""
    row = ROWS[name]
    tensors = contents(row.file)
    return {part: tensors[row.key(part)] for part in row.tensors}


def matrices(name: str) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Stored parts and weight of a row, expert by expert."""
    parts, weight = golden(name), ROWS[name].weight
    if weight.ndim == 2:
        yield parts, weight
    else:
        for expert, dense in enumerate(weight):
            yield {part: stack[expert] for part, stack in parts.items()}, dense


# What each row promises.


def test_a_version_6_gets_a_golden_file_of_its_own():
    assert sorted({row.version for row in ROWS.values()} | {5}) == list(range(1, FORMAT_VERSION + 1))
    assert sorted(file.stem for file in GOLDEN.iterdir()) == sorted([*FILES, "format_v5"])


@every_row
def test_the_config_is_still_written_as_its_version(name):
    config = SVDQConfig.from_dict(ROWS[name].stored)
    assert config.format_version == ROWS[name].version
    assert ROWS[name].stored.items() <= config.to_dict().items()


@pytest.mark.parametrize("file", FILES)
def test_a_file_holds_these_tensors_and_no_others(file):
    found = {key: (list(tensor.shape), tensor.dtype) for key, tensor in contents(file).items()}
    assert found == {
        row.key(part): tensor
        for row in ROWS.values()
        if row.file == file
        for part, tensor in row.tensors.items()
    }


@every_row
def test_the_names_and_shapes_are_those_that_the_package_computes(name):
    row = ROWS[name]
    stored = WeightName(row.prefix[:-1] if row.prefix else "", tuple(row.weight.shape))
    if name in STACKS:
        assert [stored.key(part) for part in row.tensors] == [row.key(part) for part in row.tensors]
    for parts, _ in matrices(name):
        found = {part: (tuple(tensor.shape), tensor.dtype) for part, tensor in parts.items()}
        assert found == part_specs(OUT, IN, row.scheme)


@every_row
def test_the_same_weights_become_the_same_tensors_today(name):
    parts = today(ROWS[name])
    assert list(parts) == list(ROWS[name].tensors)
    for part, stored in golden(name).items():
        assert parts[part].dtype == stored.dtype, part
        assert torch.equal(parts[part], stored), part


@every_row
def test_the_file_passes_the_checks_and_stands_for_the_weight(name):
    scheme = ROWS[name].scheme
    for parts, weight in matrices(name):
        check_parts(parts, IN, scheme)
        found = reconstruct(parts, IN, scheme)
        if ROWS[name].exact:
            assert torch.equal(found, weight)
        lost = found - weight
        assert lost.norm() / weight.fmod(100).norm() < 0.12
        assert not lost[[0, 2], [40, 69]].any()


@every_row
def test_the_file_stands_for_what_its_bytes_say(name, dense_by_hand):
    row = ROWS[name]
    for parts, weight in matrices(name):
        by_hand = torch.from_numpy(dense_by_hand(parts, IN, row.scheme.grid.columns(IN)))
        if row.exact:
            assert torch.equal(by_hand, weight.double())
        salient_values = by_hand[parts["salient_rows"].long(), parts["salient_columns"].long()]
        assert torch.equal(salient_values, parts["salient_values"].double())
        # three roundings of a product in float32
        found = reconstruct(parts, IN, row.scheme).double()
        torch.testing.assert_close(found, by_hand, rtol=0 if row.exact else 3 * 2**-24, atol=0)


@every_layer
def test_a_layer_loads_the_file_and_computes_with_it(name, device):
    row = ROWS[name]
    layer = SVDQLinear(IN, OUT, row.scheme, bias=False, device=device)
    layer.load_state_dict(golden(name), strict=True)
    # One column at a time: products with one and with zeros, exact in float32.
    found = layer(torch.eye(IN, device=device)).cpu()
    expected = row.weight if row.exact else reconstruct(golden(name), IN, row.scheme)
    torch.testing.assert_close(found, expected.T, rtol=0 if row.exact else 2**-23, atol=0)


# What a version promises beside that.


def test_version_1_the_bytes_of_the_first_row_are_those_derived_by_hand():
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


def test_version_1_scales_and_salient_parts_are_those_derived_by_hand():
    groups, tensor = golden("groups"), golden("tensor")
    # 2 ** -(3 + row + group).
    assert groups["weight_scale"].tolist() == [[1 / 8, 1 / 16], [1 / 16, 1 / 32], [1 / 32, 1 / 64]]
    assert tensor["weight_scale"].tolist() == [[1 / 8]]  # the largest, 7 / 8, over 7
    for parts in (groups, tensor):
        assert parts["salient_values"].tolist() == [100.25, -3000.0]
        assert parts["salient_rows"].tolist() == [0, 2]
        assert parts["salient_columns"].tolist() == [40, 69]


def test_version_1_reconstructs_to_literal_values():
    dense = reconstruct(golden("groups"), IN, ROWS["groups"].scheme)
    assert dense[0, :4].tolist() == [-1.0, -0.875, -0.75, -0.625]  # codes -8, -7, -6, -5 over 8
    assert dense[0, 38:43].tolist() == [-0.125, 0.0, 100.25, 0.25, 0.375]  # codes -1, 0, (1), 2, 3
    assert dense[0, 64:].tolist() == [-0.5, -0.4375, -0.375, -0.3125, -0.25, -0.1875]  # -8..-3 over 16
    # Codes -8, -5, -2, 1, 4, 7 over 32, and -8, -3, 2, 7, -4, (1) over 64.
    assert dense[1, 64:].tolist() == [-0.25, -0.15625, -0.0625, 0.03125, 0.125, 0.21875]
    assert dense[2, 64:].tolist() == [-0.125, -0.046875, 0.03125, 0.109375, -0.0625, -3000.0]


def test_version_2_has_the_levels_and_the_salient_weights_as_literals():
    parts = golden("normal")
    assert parts["levels"].tolist() == LEVELS_2
    assert parts["salient_values"].tolist() == [100.25, -3000.0]
    assert [parts["salient_rows"].tolist(), parts["salient_columns"].tolist()] == [[0, 2], [40, 69]]


def test_version_3_the_bytes_of_the_first_row_of_3_bits_are_those_derived_by_hand():
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


def test_version_3_the_bytes_of_the_first_row_of_8_bits_are_its_codes():
    codes = golden("eight")["weight"][0].flatten()
    by_hand = [127 - 4 * column for column in range(64)] + [127, 123, 119, 115, 111, 107] + [0] * 58
    by_hand[40] = 0  # salient
    assert codes.tolist() == by_hand


def test_version_3_reconstructs_to_literal_values():
    three, eight = (reconstruct(golden(name), IN, ROWS[name].scheme) for name in ("three", "eight"))
    assert three[0, :4].tolist() == [127 / 8, 80 / 8, 49 / 8, 23 / 8]  # codes -4, -3, -2, -1, scale -1/8
    assert three[0, 38:43].tolist() == [127 / 8, 80 / 8, 100.25, 23 / 8, 0.0]  # codes -4, -3, (0), -1, 0
    assert three[0, 64:66].tolist() == [0.0, -27 / 16]  # codes 0, 1, scale -1/16
    assert eight[0, :3].tolist() == [127 / 8, 123 / 8, 119 / 8]
    assert eight[2, 67:].tolist() == [67 / 64, 47 / 64, -3000.0]


@pytest.mark.parametrize("key", ["embeddings", "target_bits", "layer_k"])
def test_version_4_is_made_by_each_of_these_and_older_versions_do_not_have_the_key(key):
    assert SVDQConfig(**{key: STORED_4[key]}).format_version == 4
    assert key not in SVDQConfig().to_dict()
    assert key not in SVDQConfig(bits=3).to_dict()


def test_version_4_has_the_codes_of_version_1():
    assert torch.equal(golden("table")["weight"], golden("groups")["weight"])


def test_version_4_an_embedding_loads_the_file(device):
    table = SVDQEmbedding(nn.Embedding(OUT, IN), ROWS["table"].scheme, device)
    table.load_state_dict(golden("table"), strict=True)
    assert torch.equal(table(torch.arange(OUT, device=device)).cpu(), ROWS["table"].weight)


@every_stack
@pytest.mark.parametrize("expert", [0, 1])
def test_version_4_each_expert_has_the_bytes_of_a_layer_of_version_1(name, expert):
    size = {"gate_up_proj": 1.0, "down_proj": 4.0}[name] * 2**expert
    for part, of_layer in golden("groups").items():
        factor = size if part in ("weight_scale", "salient_values") else 1
        assert torch.equal(golden(name)[part][expert], (of_layer * factor).to(of_layer.dtype)), part


class Experts(nn.Module):
    """A class as transformers' experts interface makes them, of two matrices that need not fit."""

    has_gate, has_bias, is_transposed, is_concatenated, _apply_gate = True, False, False, True, None

    def __init__(self):
        super().__init__()
        for matrix in STACKS:
            self.register_parameter(matrix, nn.Parameter(torch.empty(2, OUT, IN)))


@every_stack
def test_version_4_a_module_of_experts_loads_the_file_and_computes_with_it(name):
    layer = SVDQExperts(Experts(), ROWS[name].scheme)
    tensors = {key.removeprefix("mlp.experts."): tensor for key, tensor in contents(ROWS[name].file).items()}
    layer.load_state_dict(tensors, strict=True)
    # One column at a time: products with one and with zeros, exact in float32.
    columns, ends = torch.eye(IN).repeat(2, 1), torch.tensor([IN, 2 * IN])
    found = layer._product(name, columns, ends, None).view(2, IN, OUT)
    assert torch.equal(found, ROWS[name].weight.transpose(1, 2))
