"""Version 5 byte for byte: layers that round their activations, their bytes derived by hand.

A row of `ROWS` is one stored weight. The file `golden/format_v5.safetensors` was written once, and is never
written again. How:

    from safetensors.torch import save_file
    tensors = {f"{name}.{part}": tensor for name in ROWS for part, tensor in today(name).items()}
    save_file(tensors, GOLDEN / "format_v5.safetensors", metadata={"format": "pt"})
"""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from svdq_hf.config import SVDQConfig
from svdq_hf.core.rotation import hadamard
from svdq_hf.format.checks import check_parts
from svdq_hf.format.parts import part_specs
from svdq_hf.nn.integer_linear import SVDQIntegerLinear
from svdq_hf.quantize.integer_weight import quantize_integer_weight

GOLDEN = Path(__file__).parent / "golden"
OUT, IN = 3, 64
I8, I32, F32, BF16 = torch.int8, torch.int32, torch.float32, torch.bfloat16
STORED = {
    "quant_method": "svdq", "format_version": 5, "k": 0, "rank": 8, "saliency": "svd", "bits": 4,
    "group_size": 32, "scale": "mse", "clip_sigma": 2.5, "levels": "linear", "column_scale": False,
    "scale_bits": 8, "error_feedback": False, "lm_head": False, "embeddings": False, "target_bits": None,
    "layer_k": None, "activations": 4, "subspace": 0.125, "modules_to_not_convert": None,
    "layer_inputs": {"attn.o": 2, "mlp.down": "hadamard"}, "compute_dtype": None, "seed": 0,
}  # fmt: skip


def code(row: int, column: int) -> int:
    """Row 0 counts up, row 1 in threes, row 2 in fives; each group has the code -8 and odd ones."""
    return (column * (2 * row + 1)) % 16 - 8


def fine(row: int, column: int) -> int:
    """Codes of 8 bits, the first of a row the largest that there is."""
    return 127 - (13 + row) * column


def stored_weight(low: int) -> Tensor:
    """What the stored parts stand for, in the order of the stored columns: multiples of powers of two."""
    rows = [
        [code(row, column) * 2.0 ** (row - 3) for column in range(low)]
        + [fine(row, column) * 2.0**-6 for column in range(IN - low)]
        for row in range(OUT)
    ]
    return torch.tensor(rows)


class Row(NamedTuple):
    """A stored weight: the weight `[out, in]` that it is of, its columns in the subspace, its tensors."""

    weight: Tensor
    high: int
    tensors: dict[str, tuple[list[int], torch.dtype]]


def tensors(high: int) -> dict[str, Any]:
    none = {f"salient_{part}": ([0], I32) for part in ("rows", "columns")}
    low = {"weight": ([3, 32], I8), "weight_scale": ([3, 2], I8), "salient_values": ([0], F32), **none}
    own = {"subspace_weight": ([3, high], I8), "subspace_scale": ([3, 1], F32)} if high else {}
    return {**low, "row_scale": ([3], BF16), **own}


def heads_put_back(stored: Tensor) -> Tensor:
    """Two heads of 32 columns, the last 8 of each being in the subspace: 24 + 24 + 8 + 8 stored columns."""
    first, second, fine_first, fine_second = stored.split([24, 24, 8, 8], 1)
    return torch.cat([first, fine_first, second, fine_second], 1)


ROWS = {
    "attn.q": Row(stored_weight(56), 8, tensors(8)),
    "attn.o": Row(heads_put_back(stored_weight(48)), 16, tensors(16)),
    "mlp.down": Row(stored_weight(64) @ hadamard(64).float(), 0, tensors(0)),
}
every_row = pytest.mark.parametrize("name", ROWS)
CONFIG = SVDQConfig.from_dict(STORED)


def today(name: str) -> dict[str, Tensor]:
    return quantize_integer_weight(ROWS[name].weight, CONFIG, f"layers.0.{name}")[0]


def golden(name: str) -> dict[str, Tensor]:
    found = load_file(GOLDEN / "format_v5.safetensors")
    return {part: found.pop(f"{name}.{part}") for part in ROWS[name].tensors}


def test_the_config_is_still_written_as_version_5():
    assert CONFIG.format_version == 5
    assert STORED.items() <= CONFIG.to_dict().items()


def test_the_file_holds_these_tensors_and_no_others():
    found = load_file(GOLDEN / "format_v5.safetensors")
    shapes = {key: (list(tensor.shape), tensor.dtype) for key, tensor in found.items()}
    assert shapes == {
        f"{name}.{part}": one for name, row in ROWS.items() for part, one in row.tensors.items()
    }


@every_row
def test_the_shapes_are_those_that_the_package_computes(name):
    scheme = CONFIG.of_layer(name).scheme
    found = {part: (tuple(one.shape), one.dtype) for part, one in golden(name).items()}
    assert found == part_specs(OUT, IN, scheme)
    check_parts(golden(name), IN, scheme)


@every_row
def test_the_same_weights_become_the_same_tensors_today(name):
    parts, stored = today(name), golden(name)
    assert parts.keys() == stored.keys()
    for part, tensor in stored.items():
        assert torch.equal(parts[part], tensor), part


@every_row
def test_the_bytes_are_those_of_the_formats_text(name):
    stored, low = golden(name), IN - ROWS[name].high
    nibbles = stored["weight"].view(torch.uint8).int()
    codes = torch.cat([nibbles & 15, nibbles >> 4], 1) - 8
    expected = torch.tensor([[code(row, column) for column in range(low)] for row in range(OUT)])
    assert torch.equal(codes[:, :low], expected.int())
    assert not codes[:, low:].any()
    if ROWS[name].high:
        own = [[fine(row, column) for column in range(ROWS[name].high)] for row in range(OUT)]
        assert stored["subspace_weight"].tolist() == own


@every_row
def test_a_layer_of_the_file_stands_for_the_weight(name):
    layer = SVDQIntegerLinear(IN, OUT, CONFIG.of_layer(name).scheme, bias=False)
    layer.load_state_dict(golden(name))
    torch.testing.assert_close(layer.dequantize(), ROWS[name].weight, rtol=2**-7, atol=1e-6)
