"""A tensor that no file holds is random after loading: commands that write one say so, or refuse."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import bert, bert_config, classifier, llama
from transformers import AutoModel, BertForSequenceClassification, LlamaForCausalLM

from svdq_hf import SVDQConfig, quantize_model, read_footprint
from svdq_hf.checkpoint.estimate import estimate_checkpoint
from svdq_hf.checkpoint.export import export_dense
from svdq_hf.checkpoint.load import load_complete
from svdq_hf.checkpoint.quantize import quantize_checkpoint
from svdq_hf.cli.command import main

CONFIG = SVDQConfig(k=4)
AGAIN = "download or copy the model again"


def without(folder: Path, *names: str) -> Path:
    """Take tensors out of a folder's file."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name in names:
        del tensors[name]
    save_file(tensors, file, {"format": "pt"})
    return folder


def saved(model: torch.nn.Module, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ((EMBEDDING, NORM), f"{EMBEDDING}, {NORM} are not in its files, and would be random; {AGAIN}"),
        ((NORM,), f"{NORM} is not in its files"),
        ((HEAD,), f"{HEAD} is not in its files"),
    ],
)
@pytest.mark.parametrize("choices", [{}, {"target_bits": 9.0}], ids=["streamed", "in memory"])
def test_missing_tensor_is_refused_and_nothing_is_written(choices, names, words, tmp_path):
    source = without(saved(llama(), tmp_path / "dense"), *names)
    config = SVDQConfig(**({"k": 4} | choices))
    with pytest.raises(ValueError, match=words):
        quantize_checkpoint(source, tmp_path / "out", config)
    with pytest.raises(ValueError, match=words):
        quantize_checkpoint(source, tmp_path / "out", SVDQConfig(k=4, error_feedback="synthetic"))
    assert [file.name for file in tmp_path.iterdir()] == ["dense"]


def test_dry_run_refuses_it_too(tmp_path, capsys):
    source = without(saved(llama(), tmp_path / "dense"), NORM)
    assert main(["quantize", str(source), str(tmp_path / "out"), "--dry-run"]) == 1
    assert f"{NORM} is not in its files" in capsys.readouterr().err


def test_many_are_counted(tmp_path):
    names = [
        f"model.layers.{layer}.{norm}_layernorm.weight"
        for layer in (0, 1)
        for norm in ("input", "post_attention")
    ]
    source = without(saved(llama(), tmp_path / "dense"), *names)
    with pytest.raises(
        ValueError, match=r"layers\.0\.input_layernorm\.weight, .* and 1 more are not in its files"
    ):
        quantize_checkpoint(source, tmp_path / "out", CONFIG)


def test_index_that_has_lost_a_file_is_refused(tmp_path):
    llama().save_pretrained(tmp_path / "dense", max_shard_size="100KB")
    file = tmp_path / "dense" / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    lost = index["weight_map"][EMBEDDING]
    index["weight_map"] = {name: at for name, at in index["weight_map"].items() if at != lost}
    file.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"would be random|the checkpoint has no weights for this layer"):
        quantize_checkpoint(tmp_path / "dense", tmp_path / "out", CONFIG)


@pytest.mark.parametrize("name", [NORM, HEAD, EMBEDDING])
def test_export_refuses_it(name, tmp_path):
    quantized = LlamaForCausalLM.from_pretrained(
        saved(llama(), tmp_path / "dense"), quantization_config=CONFIG
    )
    source = without(saved(quantized, tmp_path / "quantized"), name)
    with pytest.raises(ValueError, match=f"{name} is not in its files, and would be random; {AGAIN}"):
        export_dense(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_export_names_the_file_that_is_damaged(tmp_path, capsys):
    quantized = LlamaForCausalLM.from_pretrained(
        saved(llama(), tmp_path / "dense"), quantization_config=CONFIG
    )
    quantized.save_pretrained(tmp_path / "quantized", max_shard_size="20KB")
    second = sorted((tmp_path / "quantized").glob("*.safetensors"))[1]
    second.write_bytes(second.read_bytes()[:-7])
    for command in (["export", str(second.parent), str(tmp_path / "out")], ["inspect", str(second.parent)]):
        assert main(command) == 1
        assert f"{second}: truncated or damaged" in capsys.readouterr().err


def test_new_head_is_told_and_done(tmp_path, caplog):
    source = without(saved(classifier(), tmp_path / "dense"), "classifier.weight", "classifier.bias")
    assert "classifier.bias" in str(estimate_checkpoint(source, tmp_path / "out", CONFIG).in_memory)
    quantize_checkpoint(source, tmp_path / "out", CONFIG)
    told = [one.getMessage() for one in caplog.records if "random in the quantized model" in one.getMessage()]
    assert told == [
        f"{source}: classifier.bias, classifier.weight are not in its files, and random in the quantized "
        "model: train it"
    ]
    assert BertForSequenceClassification.from_pretrained(tmp_path / "out").is_quantized


def test_layer_that_the_user_keeps_dense_may_be_new(tmp_path):
    source = without(saved(bert(), tmp_path / "dense"), "pooler.dense.weight", "pooler.dense.bias")
    with pytest.raises(ValueError, match=r"pooler\.dense: the checkpoint has no weights for this layer"):
        quantize_checkpoint(source, tmp_path / "out", CONFIG)
    quantize_checkpoint(source, tmp_path / "out", SVDQConfig(k=4, modules_to_not_convert=["pooler"]))
    assert (tmp_path / "out" / "config.json").is_file()


def test_tie_and_what_is_never_saved_are_not_missing(tmp_path):
    model, new = load_complete(LlamaForCausalLM, saved(llama(tie_word_embeddings=True), tmp_path / "tied"))
    assert (new, model.lm_head.weight is model.model.embed_tokens.weight) == ([], True)
    _, new = load_complete(AutoModel, saved(bert(), tmp_path / "bert"))
    assert new == []
    assert bert_config().architectures is None


def test_counter_and_what_a_family_ignores_may_be_missing(tmp_path, monkeypatch):
    source = saved(llama(), tmp_path / "dense")

    class Counting(LlamaForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            self.model.register_buffer("steps", torch.tensor(0))
            self.model.register_buffer("table", torch.zeros(2))

    with pytest.raises(ValueError, match=r"model\.table is not in its files"):
        load_complete(Counting, source)
    monkeypatch.setattr(Counting, "_keys_to_ignore_on_save", ["model.table"])
    assert load_complete(Counting, source)[1] == []


SIZES = [("hidden_size", 0), ("hidden_size", -64), ("num_attention_heads", 0), ("vocab_size", -1)]


@pytest.mark.parametrize(("key", "value"), [*SIZES, ("hidden_size", "64"), ("intermediate_size", None)])
def test_a_config_of_which_no_model_can_be_made_is_named_in_one_line(key, value, tmp_path):
    quantized = quantize_model(bert(), CONFIG)
    for model, command in ((bert(), quantize_checkpoint), (quantized, export_dense)):
        folder = saved(model, tmp_path / command.__name__)
        config = {**json.loads((folder / "config.json").read_text()), key: value}
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=re.escape(str(folder / "config.json"))) as caught:
            command(folder, tmp_path / "out", *([CONFIG] if command is quantize_checkpoint else []))
        told = str(caught.value)
        assert (f"{key}={value} is no size" if (key, value) in SIZES else key) in told
        assert AGAIN in told
        assert "\n" not in told
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")  # torch's
def test_a_layer_without_weights_is_named(tmp_path):
    folder = saved(bert(), tmp_path / "model")
    config = {**json.loads((folder / "config.json").read_text()), "intermediate_size": 0}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"encoder.layer.0.output.dense: by config.json .* \[64, 0\]"):
        AutoModel.from_pretrained(folder, quantization_config=CONFIG)
    with pytest.raises(ValueError, match=r"encoder.layer.0.output.dense: by config.json .* \[64, 0\]"):
        quantize_checkpoint(folder, tmp_path / "out", CONFIG)


def test_an_index_that_names_nothing_is_named(tmp_path):
    bert().save_pretrained(tmp_path / "model", max_shard_size="50KB")
    (tmp_path / "model" / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    for call in (lambda folder: quantize_checkpoint(folder, tmp_path / "out", CONFIG), read_footprint):
        with pytest.raises(ValueError, match=r"index.json: its weight_map names no tensor; download or copy"):
            call(tmp_path / "model")
