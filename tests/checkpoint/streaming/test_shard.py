"""Streamed checkpoints equal what from_pretrained and save_pretrained give, whatever the family."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

import hypothesis.strategies as st
import pytest
import tiny_experts
import torch
from hypothesis import given, settings
from safetensors.torch import load_file
from streamed import CONFIG, check, contents, edit_config, edit_tensors, memory_only
from tiny_models import (
    FAMILIES,
    bert,
    bert_config,
    classifier,
    deberta1,
    dinov2,
    llama,
    molmo2_text,
    outputs,
    text,
)
from transformers import AutoModel, BertForMaskedLM, PreTrainedModel

import svdq_hf.checkpoint.streaming.shard
from svdq_hf import SVDQConfig
from svdq_hf.checkpoint.quantize import quantize_checkpoint
from svdq_hf.checkpoint.source import Source
from svdq_hf.checkpoint.streaming.byte_ranges import (
    DTYPE_NAMES,
    header_bytes,
    layout,
    read_bytes,
    size_of,
    tensor_places,
)
from svdq_hf.checkpoint.streaming.plan import make_plan
from svdq_hf.format.parts import PartSpec

OTHERS = {"classifier": classifier, "deberta": deberta1}
EXPERTS = {name: partial(tiny_experts.build, name) for name in tiny_experts.FAMILIES}
STREAMED = {name: family.build for name, family in FAMILIES.items()} | OTHERS | EXPERTS


def streams(build: Callable[[], PreTrainedModel], folder: Path, dtype: torch.dtype, size: str) -> None:
    build().to(dtype).save_pretrained(folder / "dense", max_shard_size=size)
    check(folder, size)
    assert (len(list((folder / "ours").glob("*.safetensors"))) > 1) == (size == "20KB")


@pytest.mark.parametrize("name", STREAMED)
@pytest.mark.parametrize(("dtype", "size"), [(torch.bfloat16, "20KB")])
def test_streamed_equals_saved(name, dtype, size, tmp_path):
    streams(STREAMED[name], tmp_path, dtype, size)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert", "gpt2", "mixtral", "gpt-oss"])  # linear, Conv1D, two of experts
@pytest.mark.parametrize(
    ("dtype", "size"),
    [(torch.float32, "1GB"), (torch.float32, "20KB"), (torch.bfloat16, "1GB"), (torch.float16, "1GB")],
)
def test_streamed_equals_saved_in_every_dtype(name, dtype, size, tmp_path):
    streams(STREAMED[name], tmp_path, dtype, size)


@pytest.mark.oldest
@pytest.mark.parametrize("stored", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("said", ["bfloat16", "float32", None])
def test_dtype_that_config_json_says_is_the_one_of_what_stays_dense(stored, said, tmp_path):
    llama().to(stored).save_pretrained(tmp_path / "dense")
    edit_config(tmp_path / "dense", dtype=said)
    check(tmp_path)


@pytest.mark.oldest
def test_tensors_that_the_model_does_not_know_are_dropped_where_they_are_named(tmp_path):
    classifier().save_pretrained(tmp_path / "dense")
    edit_tensors(tmp_path / "dense", lambda tensors: tensors.update(stray=torch.ones(3)))
    check(tmp_path, drop=("stray",))
    assert "stray" not in contents(tmp_path / "ours")[0]


def test_head_that_is_not_asked_for_is_dropped_by_name_and_names_are_the_files_own(tmp_path):
    classifier().save_pretrained(tmp_path / "dense")
    edit_config(tmp_path / "dense", architectures=["BertModel"])
    check(tmp_path, drop=("classifier",))
    assert not any("classifier" in name for name in contents(tmp_path / "ours")[0])


@pytest.mark.oldest
def test_class_is_found_where_config_json_names_none(tmp_path):
    bert().save_pretrained(tmp_path / "dense")
    edit_config(tmp_path / "dense", architectures=None)
    check(tmp_path)
    assert Source.resolve(tmp_path / "dense").kind is AutoModel


@pytest.mark.oldest
def test_a_shard_holds_whole_layers_and_no_more_than_was_asked(tmp_path):
    llama().save_pretrained(tmp_path / "dense")
    plan = make_plan(Source.resolve(tmp_path / "dense"), CONFIG, 20_000)
    assert all(shard.size <= 20_000 or len(shard.units) == 1 for shard in plan.shards)
    assert sum(one.size + next_.units[0].size > 20_000 for one, next_ in pairwise(plan.shards)) == (
        len(plan.shards) - 1
    )


@pytest.mark.parametrize("build", [dinov2, molmo2_text], ids=["dinov2", "molmo2"])
def test_family_whose_files_join_tensors_is_quantized_in_memory(build, tmp_path, caplog):
    build().save_pretrained(tmp_path / "dense")
    memory_only(tmp_path, "become one|join|cut", caplog)


@pytest.mark.oldest
def test_head_that_is_made_new_is_quantized_in_memory(tmp_path, caplog):
    bert().save_pretrained(tmp_path / "dense")
    edit_config(tmp_path / "dense", architectures=["BertForSequenceClassification"])
    memory_only(tmp_path, "classifier.*which the files do not hold", caplog)


def test_tied_tensors_that_are_both_there_are_compared_in_memory(tmp_path, caplog):
    llama(tie_word_embeddings=True).save_pretrained(tmp_path / "dense")
    edit_tensors(
        tmp_path / "dense",
        lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}),
    )
    memory_only(tmp_path, "tied and both in the files", caplog)


@pytest.mark.oldest
@pytest.mark.parametrize("name", ["llama-tied", "llama-untied", "gemma3", "qwen3", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantized_head_is_streamed_tied_or_not(name, dtype, tmp_path):
    STREAMED[name]().to(dtype).save_pretrained(tmp_path / "dense")
    check(tmp_path, "20KB", config=SVDQConfig(k=4, lm_head=True))
    assert "lm_head.salient_rows" in contents(tmp_path / "ours")[0]


def test_head_with_a_tied_bias_is_quantized_in_memory(tmp_path, caplog):
    BertForMaskedLM(bert_config()).save_pretrained(tmp_path / "dense")
    memory_only(tmp_path, "which the files do not hold", caplog, SVDQConfig(k=4, lm_head=True))


def test_budget_is_spent_in_memory(tmp_path, caplog):
    llama().save_pretrained(tmp_path / "dense")
    memory_only(tmp_path, "its budget is spent over all layers", caplog, SVDQConfig(target_bits=9, rank=2))


def test_feedback_of_a_model_on_its_own_words_runs_in_memory(tmp_path, caplog):
    llama().save_pretrained(tmp_path / "dense")
    config = SVDQConfig(k=4, error_feedback="synthetic")
    with caplog.at_level("WARNING"):
        quantize_checkpoint(tmp_path / "dense", tmp_path / "ours", config)
    assert "not streamed: the dense model makes its calibration batches" in caplog.text
    assert "lm_head.weight" in contents(tmp_path / "ours")[0]


def test_choice_that_needs_data_is_refused_before_anything_is_written(tmp_path):
    llama().save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="quantize_model"):
        quantize_checkpoint(tmp_path / "dense", tmp_path / "ours", SVDQConfig.calibrated())
    assert {file.name for file in tmp_path.iterdir()} == {"dense"}


@pytest.mark.oldest
def test_a_streamed_model_answers_as_the_loaded_one(tmp_path):
    llama().save_pretrained(tmp_path / "dense")
    quantize_checkpoint(tmp_path / "dense", tmp_path / "ours", CONFIG)
    loaded = type(llama()).from_pretrained(tmp_path / "dense", quantization_config=CONFIG)
    streamed = type(llama()).from_pretrained(tmp_path / "ours")
    assert torch.equal(outputs(loaded, text()), outputs(streamed, text()))


def test_parts_that_are_not_those_of_the_plan_are_not_written(tmp_path, monkeypatch):
    llama().save_pretrained(tmp_path / "dense")
    real = svdq_hf.checkpoint.streaming.shard.quantize_weight
    other = SVDQConfig(k=5)
    monkeypatch.setattr(
        svdq_hf.checkpoint.streaming.shard, "quantize_weight", lambda w, _, name: real(w, other, name)
    )
    with pytest.raises(ValueError, match=r"salient_columns: \[5\] torch.int32, planned was .*\(4,\)"):
        quantize_checkpoint(tmp_path / "dense", tmp_path / "ours", CONFIG)


@settings(max_examples=40)
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=5).filter(lambda name: name != "__metadata__"),
        st.tuples(st.lists(st.integers(0, 5), max_size=3), st.sampled_from(sorted(DTYPE_NAMES, key=str))),
        min_size=1,
        max_size=6,
    )
)
def test_files_written_by_hand_are_read_by_the_library(tmp_path_factory, shapes):
    folder = tmp_path_factory.mktemp("files")
    tensors = {name: PartSpec(tuple(shape), dtype) for name, (shape, dtype) in shapes.items()}
    data = {name: torch.randint(0, 2, (size_of(spec),), dtype=torch.uint8) for name, spec in tensors.items()}
    body = b"".join(data[name].numpy().tobytes() for name in layout(tensors))
    (folder / "model.safetensors").write_bytes(header_bytes(tensors, {"format": "pt"}) + body)
    places = tensor_places(folder)
    read = load_file(folder / "model.safetensors")
    assert read.keys() == places.keys() == tensors.keys()
    for name, spec in tensors.items():
        assert (tuple(read[name].shape), read[name].dtype) == spec
        assert torch.equal(read[name].reshape(-1).view(torch.uint8), data[name])
        assert torch.equal(read_bytes(places[name]), data[name])
        assert (places[name].start - len(body)) % spec.dtype.itemsize == -len(body) % spec.dtype.itemsize
