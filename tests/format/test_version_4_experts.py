"""Format version 4, stacks of experts: their names, and the bytes of version 1 in each of them.

The file `golden/format_v4_experts.safetensors` was written once, by version 0.1.0, and is never written
again; how, `test_version_1.py` says. Two experts of two matrices: expert 0 of `gate_up_proj` is the layer of
`format_v1.safetensors`, with its bytes; the others are that one, doubled with each expert and matrix.
"""

from pathlib import Path

import pytest
import torch
from golden_v1 import CONFIGS, IN, OUT, weight
from safetensors.torch import load_file
from torch import nn

from svdq_hf.config import SVDQConfig
from svdq_hf.format.checks import check_parts
from svdq_hf.format.decode import reconstruct
from svdq_hf.format.names import WeightName
from svdq_hf.nn.experts import SVDQExperts
from svdq_hf.quantize.weight import quantize_stack

FOLDER = Path(__file__).parent / "golden"
GOLDEN = FOLDER / "format_v4_experts.safetensors"
MATRICES = {"gate_up_proj": 1.0, "down_proj": 4.0}

# As config.json of a model of version 4 holds them; never to be changed.
STORED = CONFIGS["groups"] | {
    "format_version": 4, "levels": "linear", "column_scale": False, "scale_bits": 16,
}  # fmt: skip
PARTS = ["weight", "weight_scale", "salient_values", "salient_rows", "salient_columns"]
every_matrix = pytest.mark.parametrize("matrix", MATRICES)


def dense(matrix):
    return torch.stack([weight("groups"), 2 * weight("groups")]) * MATRICES[matrix]


def today(matrix):
    return quantize_stack(dense(matrix), SVDQConfig.from_dict(STORED), matrix)[0]


def golden(matrix):
    stored = WeightName(f"mlp.experts.{matrix}", (2, OUT, IN))
    return {part: load_file(GOLDEN)[stored.key(part)] for part in PARTS}


def test_the_config_is_still_of_version_4():
    assert SVDQConfig.from_dict(STORED).format_version == 4


def test_the_file_holds_these_tensors_and_no_others():
    found = {key: (list(tensor.shape), tensor.dtype) for key, tensor in load_file(GOLDEN).items()}
    assert found == {
        "mlp.experts.gate_up_proj": ([2, 3, 64], torch.int8),
        "mlp.experts.gate_up_proj_weight_scale": ([2, 3, 2], torch.bfloat16),
        "mlp.experts.gate_up_proj_salient_values": ([2, 2], torch.float32),
        "mlp.experts.gate_up_proj_salient_rows": ([2, 2], torch.int32),
        "mlp.experts.gate_up_proj_salient_columns": ([2, 2], torch.int32),
        "mlp.experts.down_proj": ([2, 3, 64], torch.int8),
        "mlp.experts.down_proj_weight_scale": ([2, 3, 2], torch.bfloat16),
        "mlp.experts.down_proj_salient_values": ([2, 2], torch.float32),
        "mlp.experts.down_proj_salient_rows": ([2, 2], torch.int32),
        "mlp.experts.down_proj_salient_columns": ([2, 2], torch.int32),
    }


@every_matrix
def test_the_same_weights_become_the_same_tensors_today(matrix):
    parts = today(matrix)
    assert parts.keys() == golden(matrix).keys()
    for part, stored in golden(matrix).items():
        assert parts[part].dtype == stored.dtype, part
        assert torch.equal(parts[part], stored), part


@every_matrix
@pytest.mark.parametrize("expert", [0, 1])
def test_each_expert_has_the_bytes_of_a_layer_of_version_1(matrix, expert):
    layer, size = load_file(FOLDER / "format_v1.safetensors"), MATRICES[matrix] * 2**expert
    for part, stack in golden(matrix).items():
        factor = size if part in ("weight_scale", "salient_values") else 1
        assert torch.equal(stack[expert], (layer[f"groups.{part}"] * factor).to(stack.dtype)), part


@every_matrix
def test_the_file_stands_for_the_weights(matrix):
    scheme = SVDQConfig.from_dict(STORED).scheme
    for expert, wanted in enumerate(dense(matrix)):
        parts = {part: stack[expert] for part, stack in golden(matrix).items()}
        check_parts(parts, IN, scheme)
        assert torch.equal(reconstruct(parts, IN, scheme), wanted)


class Experts(nn.Module):
    """A class as transformers' experts interface makes them, of two matrices that need not fit."""

    has_gate, has_bias, is_transposed, is_concatenated, _apply_gate = True, False, False, True, None

    def __init__(self):
        super().__init__()
        for matrix in MATRICES:
            self.register_parameter(matrix, nn.Parameter(torch.empty(2, OUT, IN)))


@every_matrix
def test_a_module_loads_the_file_and_computes_with_it(matrix):
    layer = SVDQExperts(Experts(), SVDQConfig.from_dict(STORED).scheme)
    tensors = {key.removeprefix("mlp.experts."): tensor for key, tensor in load_file(GOLDEN).items()}
    layer.load_state_dict(tensors, strict=True)
    # One column at a time: products with one and with zeros, exact in float32.
    columns, ends = torch.eye(IN).repeat(2, 1), torch.tensor([IN, 2 * IN])
    found = layer._product(matrix, columns, ends, None).view(2, IN, OUT)
    assert torch.equal(found, dense(matrix).transpose(1, 2))
