import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import bert_config
from torch import nn
from transformers import BertModel

from svdq_hf import SVDQConfig, footprint, quantize_model, read_footprint
from svdq_hf.format.metadata import METADATA_KEY
from svdq_hf.quantize.footprint import dense_bytes


@pytest.fixture
def model() -> nn.Module:
    return quantize_model(BertModel(bert_config()), SVDQConfig(k=10))


def test_bytes_are_those_of_the_tensors_each_counted_once(model):
    result = footprint(model)
    stored = model.state_dict()
    assert result.total_bytes == sum(tensor.nbytes for tensor in stored.values())
    assert result.weights == 2 * (4 * 64 * 64 + 2 * 64 * 96) + 64 * 64
    assert result.salient_share == 13 * 10 / result.weights
    assert dense_bytes(result.layers) == 4 * result.weights


def test_layer_by_hand(model):
    layer = next(found for found in footprint(model).layers if found.name.endswith("0.output.dense"))
    assert (layer.out, layer.in_features, layer.k) == (64, 96, 10)
    # a row of 96 is two blocks of 32 bytes, three scales of a byte and their factor of 2 bytes; a column
    # has a scale of 2 bytes; a salient weight is 12 bytes; there are 16 levels
    assert layer.stored_bytes == 64 * (64 + 3 + 2) + 96 * 2 + 10 * 12 + 16
    assert layer.bits_per_weight == 8 * layer.stored_bytes / (64 * 96)


@pytest.mark.parametrize(("bits", "levels"), [(3, 8), (8, 0)])
def test_layer_of_other_bits_by_hand(bits, levels, tmp_path):
    model = quantize_model(BertModel(bert_config()), SVDQConfig(k=10, bits=bits))
    model.save_pretrained(tmp_path)
    assert read_footprint(tmp_path) == footprint(model)
    layer = next(found for found in footprint(model).layers if found.name.endswith("0.output.dense"))
    assert (layer.out, layer.in_features, layer.k) == (64, 96, 10)
    # as above, but for blocks of 8 bytes for each bit, and the levels
    assert layer.stored_bytes == 64 * (2 * 8 * bits + 3 + 2) + 96 * 2 + 10 * 12 + levels
    file = tmp_path / "model.safetensors"
    save_file(load_file(file), file)
    layers = {layer.name: layer for layer in read_footprint(tmp_path).layers}
    assert layers["encoder.layer.0.output.dense"].in_features == 128  # without the fact, whole blocks


def test_folder_and_memory_agree(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert read_footprint(tmp_path) == footprint(model)


def test_sharded_folder_and_memory_agree(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert read_footprint(tmp_path) == footprint(model)


def test_plain_module_has_no_layers_and_only_dense_bytes():
    result = footprint(nn.Linear(3, 5))
    assert (result.layers, result.bits_per_weight, result.salient_share) == ([], 0.0, 0.0)
    assert result.dense_bytes == 4 * (15 + 5)


@pytest.mark.parametrize(
    "metadata",
    [None, "not json", "[]", json.dumps({"encoder.layer.0.output.dense": {"shape": ["a", -1], "x": "y"}})],
    ids=["absent", "not-json", "no-object", "nonsense"],
)
def test_strangers_metadata_is_read_as_unknown(model, tmp_path, metadata):
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file(load_file(file), file, metadata and {METADATA_KEY: metadata})
    layers = {layer.name: layer for layer in read_footprint(tmp_path).layers}
    # without the fact, the width is that of whole blocks: 128 for 96
    assert layers["encoder.layer.0.output.dense"].in_features == 128
    assert layers["encoder.layer.0.output.dense"].facts == {}


@pytest.mark.parametrize("change", ["truncated", "part missing", "not 2-d"])
def test_damaged_file_is_one_clear_error(model, tmp_path, change):
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = "encoder.layer.0.output.dense"
    if change == "truncated":
        file.write_bytes(file.read_bytes()[:100])
    elif change == "part missing":
        del tensors[f"{name}.weight_scale"]
        save_file(tensors, file)
    else:
        tensors[f"{name}.weight"] = torch.zeros(3, dtype=torch.int8)
        save_file(tensors, file)
    message = {
        "truncated": r"model\.safetensors: truncated or damaged .*download or copy",
        "part missing": f"{name}: weight_scale is missing",
        "not 2-d": f"{name}: weight is",
    }[change]
    with pytest.raises(ValueError, match=message):
        read_footprint(tmp_path)
