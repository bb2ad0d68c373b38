"""Format version 4, byte for byte: k layer by layer, and an embedding that is packed.

The file `golden/format_v4.safetensors` was written once, by version 0.1.0, and is never written
again; how, `test_version_1.py` says. Weights and bytes are those of version 1, derived there by hand.
"""

from pathlib import Path

import golden_v1 as first
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from svdq_hf.config import SVDQConfig
from svdq_hf.core.topk import top_positions
from svdq_hf.format.checks import check_parts
from svdq_hf.format.decode import reconstruct
from svdq_hf.format.encode import decompose
from svdq_hf.format.parts import part_specs
from svdq_hf.format.versions import FORMAT_VERSION
from svdq_hf.nn.embedding import SVDQEmbedding
from svdq_hf.nn.linear import SVDQLinear

GOLDEN = Path(__file__).parent / "golden" / "format_v4.safetensors"
OUT, IN = first.OUT, first.IN

# As config.json of a model of version 4 holds it; never to be changed.
STORED = {
    "quant_method": "svdq", "format_version": 4, "bits": 4, "k": 2, "rank": 8, "saliency": "magnitude",
    "group_size": 64, "scale": "mse", "levels": "linear", "column_scale": False, "scale_bits": 16,
    "embeddings": True, "target_bits": 31.0, "layer_k": {"one": 1, "none": 0},
}  # fmt: skip
KS = {"one": 1, "none": 0, "table": 2}
"""By layer; the embedding is not named, and has the config's own k."""
every_layer = pytest.mark.parametrize("name", KS)


def weight(name):
    """That of version 1; entries that are not salient here are 0."""
    dense = first.weight("groups")
    for row, column in [(0, 40), (2, 69)][: 2 - KS[name]]:  # 100.25 and -3000
        dense[row, column] = 0
    return dense


def scheme(name):
    return SVDQConfig.from_dict(STORED).of_layer(name).scheme


def today(name):
    dense = weight(name)
    return decompose(dense, *top_positions(dense.abs(), KS[name]), scheme(name))


def golden(name):
    prefix = f"{name}."
    return {key[len(prefix) :]: part for key, part in load_file(GOLDEN).items() if key.startswith(prefix)}


def test_a_version_5_gets_a_golden_file_of_its_own():
    assert FORMAT_VERSION == 4


def test_these_choices_are_written_as_version_4():
    config = SVDQConfig.from_dict(STORED)
    assert config.format_version == 4
    assert STORED.items() <= config.to_dict().items()


@pytest.mark.parametrize("key", ["embeddings", "target_bits", "layer_k"])
def test_each_of_them_makes_it_version_4_and_older_versions_do_not_have_the_key(key):
    assert SVDQConfig(**{key: STORED[key]}).format_version == 4
    assert key not in SVDQConfig().to_dict()
    assert key not in SVDQConfig(bits=3).to_dict()


@every_layer
def test_the_file_holds_what_part_specs_says(name):
    specs = part_specs(OUT, IN, scheme(name))
    assert {part: (tuple(t.shape), t.dtype) for part, t in golden(name).items()} == specs
    assert golden(name)["salient_values"].shape == (KS[name],)
    assert len(load_file(GOLDEN)) == 3 * len(specs)


@every_layer
def test_the_same_weights_decompose_into_the_same_tensors_today(name):
    for part, stored in golden(name).items():
        assert torch.equal(today(name)[part], stored), part


@every_layer
def test_the_file_stands_for_the_weight_and_for_what_its_bytes_say(name, dense_by_hand):
    check_parts(golden(name), IN, scheme(name))
    assert torch.equal(reconstruct(golden(name), IN, scheme(name)), weight(name))
    assert torch.equal(torch.from_numpy(dense_by_hand(golden(name), IN, 64)), weight(name).double())


def test_the_codes_are_those_of_version_1():
    assert torch.equal(golden("table")["weight"], load_file(first.GOLDEN)["groups.weight"])


def test_a_layer_and_an_embedding_load_the_file(device):
    layer = SVDQLinear(IN, OUT, scheme("one"), bias=False, device=device)
    layer.load_state_dict(golden("one"), strict=True)
    assert torch.equal(layer(torch.eye(IN, device=device)).cpu(), weight("one").T)
    table = SVDQEmbedding(nn.Embedding(OUT, IN), scheme("table"), device)
    table.load_state_dict(golden("table"), strict=True)
    assert torch.equal(table(torch.arange(OUT, device=device)).cpu(), weight("table"))
