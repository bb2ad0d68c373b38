"""Format version 2, byte for byte: what version 1 does not have, derived by hand.

The file `golden/format_v2.safetensors` was written once, by version 0.1.0, and is never written
again; how, `test_version_1.py` says.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file

from svdq_hf.config import SVDQConfig
from svdq_hf.core.topk import top_positions
from svdq_hf.format.checks import check_parts
from svdq_hf.format.decode import reconstruct
from svdq_hf.format.encode import decompose
from svdq_hf.nn.linear import SVDQLinear

GOLDEN = Path(__file__).parent / "golden" / "format_v2.safetensors"
OUT, IN, K = 3, 70, 2
STORED = {
    "quant_method": "svdq", "format_version": 2, "bits": 4, "k": K, "rank": 8, "saliency": "magnitude",
    "group_size": 32, "scale": "mse", "levels": "normal", "column_scale": True, "scale_bits": 8,
}  # fmt: skip
SCHEME = SVDQConfig.from_dict(STORED).scheme
LEVELS = [-127, -99, -76, -59, -44, -32, -20, -10, 0, 12, 24, 37, 51, 68, 89, 123]


def weight():
    """Rows of sizes 1, 2 and 4, columns of sizes 1 and 8, every level used; and two large entries."""
    row, column = torch.arange(OUT).unsqueeze(1), torch.arange(IN)
    level = torch.tensor(LEVELS)[(5 * row + 3 * column) % 16]
    values = level / 1024 * 2.0**row * torch.where(column % 2 == 0, 1.0, 8.0)
    values[0, 40], values[2, 69] = 100.25, -3000.0
    return values


def today():
    dense = weight()
    return decompose(dense, *top_positions(dense.abs(), K), SCHEME)


def golden():
    return load_file(GOLDEN)


def test_the_file_holds_these_tensors_and_no_others():
    found = {key: (list(tensor.shape), tensor.dtype) for key, tensor in golden().items()}
    assert found == {
        "weight": ([3, 64], torch.int8),
        "weight_scale": ([3, 3], torch.int8),
        "salient_values": ([2], torch.float32),
        "salient_rows": ([2], torch.int32),
        "salient_columns": ([2], torch.int32),
        "row_scale": ([3], torch.bfloat16),
        "column_scale": ([70], torch.bfloat16),
        "levels": ([16], torch.int8),
    }


def test_the_same_weights_decompose_into_the_same_tensors_today():
    parts = today()
    for part, stored in golden().items():
        assert torch.equal(parts[part], stored), part


def test_the_file_stands_for_what_its_bytes_say(dense_by_hand):
    by_hand = torch.from_numpy(dense_by_hand(golden(), IN, 32))
    assert by_hand[0, 40] == 100.25
    assert by_hand[2, 69] == -3000.0
    assert golden()["levels"].tolist() == LEVELS
    # three roundings of a product in float32
    torch.testing.assert_close(reconstruct(golden(), IN, SCHEME).double(), by_hand, rtol=3 * 2**-24, atol=0)


def test_the_file_passes_the_checks_and_is_near_the_weight():
    check_parts(golden(), IN, SCHEME)
    lost = reconstruct(golden(), IN, SCHEME) - weight()
    assert lost.norm() / weight().fmod(100).norm() < 0.12
    assert not lost[[0, 2], [40, 69]].any()


def test_a_layer_loads_the_file_and_computes_with_it(device):
    layer = SVDQLinear(IN, OUT, SCHEME, bias=False, device=device)
    layer.load_state_dict(golden(), strict=True)
    # One column at a time: products with one and with zeros, exact in float32.
    found = layer(torch.eye(IN, device=device)).cpu()
    torch.testing.assert_close(found, reconstruct(golden(), IN, SCHEME).T, rtol=2**-23, atol=0)
