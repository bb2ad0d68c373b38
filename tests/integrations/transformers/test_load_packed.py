"""What config.json says of a packed head and a packed embedding, and what the files hold."""

import json

import pytest
import tiny_models as tiny
import torch
from damaged import Saved
from transformers import AutoModel, AutoModelForCausalLM, BertForMaskedLM, BertForSequenceClassification

from svdq_hf import SVDQConfig, quantize_model
from svdq_hf.format.metadata import METADATA_KEY

CHOICES = {"head": {"lm_head": True}, "embedding": {"embeddings": True}, "none": {}}


@pytest.fixture
def saved(request, tmp_path):
    quantize_model(tiny.llama(), SVDQConfig(k=8, **CHOICES[request.param])).save_pretrained(tmp_path)
    return Saved(tmp_path)


def said(saved, **choices):
    saved.config["quantization_config"] |= {"format_version": 4, "embeddings": False, "lm_head": False}
    saved.config["quantization_config"] |= choices
    return saved.write()


@pytest.mark.parametrize(
    ("saved", "choices", "told"),
    [
        ("head", {}, "says lm_head: false, the files hold lm_head packed"),
        ("none", {"lm_head": True}, "says lm_head: true, the files hold lm_head dense"),
        ("embedding", {}, "says embeddings: false, the files hold model.embed_tokens packed"),
    ],
    indirect=["saved"],
)
def test_a_config_that_says_otherwise_is_refused(saved, choices, told):
    with pytest.raises(ValueError, match=f"{told}.*The checkpoint is damaged"):
        AutoModelForCausalLM.from_pretrained(said(saved, **choices))


def test_two_matrices_of_a_config_that_says_tied_are_two(tmp_path):
    torch.manual_seed(0)
    model = tiny.llama(tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight.copy_(2 * model.model.embed_tokens.weight)
    quantize_model(model, SVDQConfig(k=8, lm_head=True, embeddings=True))
    model.config.tie_word_embeddings = True
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.tensor([[1, 5, 9]])
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


def without(saved, layer):
    """The files without a layer, and without what their header says of it."""
    for name in [name for name in saved.tensors if name.startswith(f"{layer}.")]:
        del saved.tensors[name]
    known = json.loads(saved.metadata[METADATA_KEY])
    del known[layer]
    saved.metadata[METADATA_KEY] = json.dumps(known)
    return saved.write()


@pytest.mark.parametrize("loads", [AutoModel, AutoModelForCausalLM], ids=["its base", "its class"])
@pytest.mark.parametrize("saved", ["none"], indirect=True)
def test_a_layer_that_the_files_have_of_every_other_block_is_named(saved, loads):
    layer = "model.layers.1.mlp.up_proj"
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj: .*no weights for this layer.*damaged"):
        loads.from_pretrained(without(saved, layer))


def test_a_layer_that_a_saved_class_must_have_is_named(tmp_path):
    quantize_model(tiny.bert(), SVDQConfig(k=8)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"pooler\.dense: .*no weights for this layer"):
        AutoModel.from_pretrained(without(Saved(tmp_path), "pooler.dense"))


def test_a_pooler_that_the_files_never_had_is_dense_and_new(tmp_path):
    torch.manual_seed(0)
    quantize_model(BertForMaskedLM(tiny.bert_config()), SVDQConfig(k=8)).save_pretrained(tmp_path)
    model = BertForSequenceClassification.from_pretrained(tmp_path)
    assert type(model.bert.pooler.dense) is torch.nn.Linear


def test_more_blocks_than_the_files_have_are_refused(tmp_path):
    quantize_model(tiny.llama(), SVDQConfig(k=8)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model\.layers\.2\..*no weights for this layer"):
        AutoModelForCausalLM.from_pretrained(tmp_path, num_hidden_layers=3)


@pytest.mark.parametrize("family", ["bert", "mixtral"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bias_that_is_no_number_is_named(family, value, tmp_path):
    model = {"bert": tiny.bert, "mixtral": tiny.mixtral}[family]()
    name, layer = next((n, m) for n, m in model.named_modules() if n.endswith(("pooler.dense", "q_proj")))
    layer.bias = torch.nn.Parameter(torch.zeros(layer.out_features))
    layer.bias.data[1] = value
    with pytest.raises(ValueError, match=f"{name}: bias has a NaN or an infinity"):
        quantize_model(model, SVDQConfig(k=8))
    assert type(layer) is torch.nn.Linear


@pytest.mark.parametrize("way", ["quantized", "loaded"])
def test_a_bias_that_is_no_number_is_named_on_load(way, tmp_path):
    config = SVDQConfig(k=8)
    model = tiny.bert() if way == "quantized" else quantize_model(tiny.bert(), config)
    model.pooler.dense.bias.data[1] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"pooler\.dense: bias has a NaN or an infinity"):
        AutoModel.from_pretrained(tmp_path, **({"quantization_config": config} if way == "quantized" else {}))


@pytest.mark.parametrize("build", [tiny.bert, tiny.mixtral], ids=["layers", "experts"])
def test_a_file_whose_header_is_not_padded_loads_and_computes(build, tmp_path):
    """Of such a file no tensor starts at a multiple of its dtype's size in memory."""
    model = quantize_model(build(), SVDQConfig(k=8))
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].rstrip(b" ")
    header += b" " * (1 - len(header) % 2)  # an odd number of bytes
    file.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
    again = type(model).from_pretrained(tmp_path)
    inputs = {"input_ids": tiny.tokens()}
    assert torch.equal(tiny.outputs(again, inputs), tiny.outputs(model, inputs))
