"""Changes to transformers, and that they are needed: a model's dtype, names in files, ties, precision."""

import json

import pytest
import tiny_models as tiny
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from svdq_hf import SVDQConfig, quantize_model
from svdq_hf.checkpoint.quantize import quantize_checkpoint
from svdq_hf.integrations.transformers import load, load_dense, patches
from svdq_hf.integrations.transformers.patches import main_dtype
from svdq_hf.nn.embedding import TiedEmbedding
from svdq_hf.quantize import head

CONFIG = SVDQConfig(k=9)
LAYER = "model.layers.0.self_attn.q_proj"
CHOICES = [{}, {"lm_head": True}, {"embeddings": True}]


@pytest.fixture(params=CHOICES, ids=["layers", "head", "embedding"])
def config(request):
    return SVDQConfig(k=9, **request.param)


@pytest.fixture
def dense(config, tmp_path):
    folder = tmp_path / "dense"
    tied = not config.embeddings
    tiny.llama(tie_word_embeddings=tied).to(torch.bfloat16).save_pretrained(folder)
    return folder


def said(folder):
    return json.loads((folder / "config.json").read_text())["dtype"]


def answers(model):
    with torch.no_grad():
        return model(torch.tensor([[1, 5, 9]])).logits


def test_a_bfloat16_model_comes_back_bit_for_bit(dense, config, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=config)
    assert model.dtype == torch.bfloat16
    model.save_pretrained(tmp_path / "packed")
    assert said(tmp_path / "packed") == "bfloat16"
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert again.dtype == answers(again).dtype == torch.bfloat16
    assert torch.equal(answers(again), answers(model))


def test_streamed_it_has_the_same_config(dense, config, tmp_path):
    quantize_checkpoint(dense, tmp_path / "packed", config)
    assert said(tmp_path / "packed") == "bfloat16"


def test_quantized_in_memory_and_made_dense_again_it_keeps_its_dtype(dense, config):
    model = quantize_model(AutoModelForCausalLM.from_pretrained(dense), config)
    assert model.dtype == torch.bfloat16
    assert {weight.dtype for weight in model.dequantize().parameters()} == {torch.bfloat16}


def test_where_nothing_is_dense_salient_weights_answer():
    assert main_dtype(torch.nn.ParameterDict({"salient_values": torch.ones(2)})) == torch.float32


# What transformers does by itself: a change is needed while its test passes.


def dense_folder(folder, **choices):
    torch.manual_seed(0)
    tiny.llama(**choices).save_pretrained(folder)
    return folder


def test_transformers_takes_a_salient_weight_for_the_models_dtype():
    model = tiny.llama(tie_word_embeddings=False).to(torch.bfloat16)
    model = quantize_model(model, SVDQConfig(k=9, embeddings=True))
    assert patches.OWN_DTYPE.fget(model) == torch.float32
    assert model.dtype == torch.bfloat16


def test_transformers_rounds_a_weight_before_it_is_quantized(tmp_path, monkeypatch):
    def salient(folder):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=CONFIG)
        return model.get_submodule(LAYER).salient_values

    folder = dense_folder(tmp_path)
    exact = salient(folder)
    monkeypatch.setattr(load_dense, "load_exactly", lambda model, weights, exact: lambda: None)
    rounded = salient(folder)
    assert torch.equal(rounded, rounded.bfloat16().float())
    assert not torch.equal(exact, exact.bfloat16().float())


def test_transformers_joins_packed_parts_on_save(tmp_path, monkeypatch):
    monkeypatch.setattr(load, "keep_own_names", lambda model: None)
    model = quantize_model(tiny.dinov2(), CONFIG)
    model.save_pretrained(tmp_path)
    names = set(load_file(tmp_path / "model.safetensors"))
    assert "encoder.layer.0.mlp.weights_in.weight" in names  # up and gate, one below the other
    assert "encoder.layer.0.mlp.up_proj.weight" not in names


def test_transformers_ties_what_is_packed(tmp_path, monkeypatch):
    folder = dense_folder(tmp_path / "dense", tie_word_embeddings=True)
    model = quantize_model(AutoModelForCausalLM.from_pretrained(folder), SVDQConfig(k=9, lm_head=True))
    assert isinstance(model.get_input_embeddings(), TiedEmbedding)
    model.save_pretrained(tmp_path / "packed")
    monkeypatch.setattr(head, "_untie", lambda model, modules: None)
    with pytest.raises((AttributeError, KeyError, ValueError)):
        AutoModelForCausalLM.from_pretrained(tmp_path / "packed")


@pytest.fixture
def student():
    """A dense model that was made from a quantized one's config."""
    teacher = quantize_model(tiny.llama(), CONFIG)
    return AutoModelForCausalLM.from_config(teacher.config)


def test_transformers_writes_a_dense_models_quantization_config(student, tmp_path):
    patches.OWN_SAVE(student, tmp_path)
    with pytest.raises(ValueError, match="take quantization_config out of its"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_dense_model_of_a_quantized_config_is_saved_dense(student, tmp_path):
    student.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert tiny.different_tensors(student, again) == []
    assert not hasattr(again.config, "quantization_config")
    assert student.config.quantization_config.k == 9  # a config may be shared with a quantized model


def test_a_quantized_model_saves_its_config_still(tmp_path):
    quantize_model(tiny.llama(), CONFIG).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["k"] == 9


@pytest.fixture(params=[{"lm_head": True}, {"embeddings": True}], ids=["head", "embedding"])
def with_packed_end(request):
    model = tiny.llama(tie_word_embeddings=False)
    return quantize_model(model, SVDQConfig(k=9, **request.param))


def test_transformers_resizes_half_of_a_model():
    model = quantize_model(tiny.llama(tie_word_embeddings=False), SVDQConfig(k=9, lm_head=True))
    rows = model.get_input_embeddings().weight.shape[0]
    with pytest.raises(TypeError):
        patches.OWN_RESIZE(model, rows + 8)
    assert model.get_input_embeddings().weight.shape[0] == rows + 8


@pytest.mark.parametrize("pad", [None, 7])
def test_a_model_with_a_packed_end_is_not_resized(pad, with_packed_end):
    before = answers(with_packed_end)
    rows = with_packed_end.config.vocab_size
    with pytest.raises(ValueError, match=rf"head or embedding has {rows} rows .*dequantize_model"):
        with_packed_end.resize_token_embeddings(rows + 8, pad_to_multiple_of=pad)
    assert torch.equal(answers(with_packed_end), before)


def test_a_model_with_dense_ends_is_resized():
    model = quantize_model(tiny.llama(tie_word_embeddings=False), CONFIG)
    model.resize_token_embeddings(model.config.vocab_size + 8)
    assert model.lm_head.out_features == model.get_input_embeddings().num_embeddings


def test_transformers_counts_packed_bytes():
    dense = tiny.bert().num_parameters()
    model = quantize_model(tiny.bert(), CONFIG)
    assert patches.OWN_COUNT(model) < dense == model.num_parameters()


COUNTED = {
    "layers": (tiny.bert, {}),
    "bits": (tiny.bert, {"bits": 3}),
    "k=0": (tiny.bert, {"k": 0}),
    "embedding": (tiny.bert, {"embeddings": True}),
    "head": (lambda: tiny.llama(tie_word_embeddings=False), {"lm_head": True}),
    "tied head": (lambda: tiny.llama(tie_word_embeddings=True), {"lm_head": True}),
    "experts": (tiny.mixtral, {}),
}


@pytest.mark.parametrize("case", COUNTED)
@pytest.mark.parametrize("exclude_embeddings", [False, True], ids=["all", "without embeddings"])
def test_a_quantized_model_has_as_many_weights_as_the_dense_one(case, exclude_embeddings):
    build, choices = COUNTED[case]
    dense = build().num_parameters(exclude_embeddings=exclude_embeddings)
    model = quantize_model(build(), SVDQConfig(**{"k": 9, **choices}))
    assert model.num_parameters(exclude_embeddings=exclude_embeddings) == dense
    training = {name: one for name, one in model.named_parameters() if one.requires_grad}
    if exclude_embeddings:
        tables = {id(one) for table in patches.packed_tables(model) for one in table.parameters()}
        tables |= {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
        training = {name: one for name, one in training.items() if id(one) not in tables}
    expected = sum(one.numel() for one in training.values())
    assert model.num_parameters(only_trainable=True, exclude_embeddings=exclude_embeddings) == expected


def test_a_saved_index_says_as_many(tmp_path):
    dense = tiny.bert().num_parameters()
    quantize_model(tiny.bert(), CONFIG).save_pretrained(tmp_path, max_shard_size="50KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_parameters"] == dense
