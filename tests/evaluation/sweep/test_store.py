import json

import pytest

from svdq_hf.evaluation.sweep.store import CELLS, INPUTS, append, check_inputs, digest, model_facts

DATA = {"text": digest(["a text"]), "tokens": 100}
MODELS = {"run": {"list of files": ["config.json"], "config.json": "00"}}


def cell(out, task="perplexity, context 64", model="run"):
    out.mkdir(exist_ok=True)
    append(out / CELLS, [{"task": task, "model": model}])


def test_same_inputs_go_on(tmp_path):
    out = tmp_path / "new" / "out"
    for _ in range(2):
        check_inputs(out, "perplexity", DATA, MODELS)
        cell(out)
    noted = json.loads((out / INPUTS).read_text())
    assert noted == {"perplexity": {"data": DATA, "models": MODELS}}


@pytest.mark.parametrize(
    ("data", "models", "told"),
    [
        ({**DATA, "text": "01"}, MODELS, r"perplexity are of other data \(different: text\)"),
        ({**DATA, "tokens": 50}, MODELS, r"other data \(different: tokens 100, now 50\)"),
        ({"text": "01", "tokens": 50}, MODELS, r"\(different: text; tokens 100, now 50\)"),
        (
            DATA,
            {"run": {**MODELS["run"], "config.json": "01"}},
            r"run are of another model \(.*: config.json\)",
        ),
        (DATA, {"run": {"list of files": []}}, r"another model \(different: list of files\)"),
    ],
    ids=["text", "tokens", "both", "model", "files"],
)
def test_other_inputs_are_refused_where_there_are_cells_of_them(data, models, told, tmp_path):
    check_inputs(tmp_path, "perplexity", DATA, MODELS)
    cell(tmp_path)
    noted = (tmp_path / INPUTS).read_text()
    with pytest.raises(ValueError, match=rf"{told}; name another --out, or remove"):
        check_inputs(tmp_path, "perplexity", data, models)
    assert (tmp_path / INPUTS).read_text() == noted


def test_other_inputs_are_taken_where_no_cell_was_finished(tmp_path):
    other = {"run": {"config.json": "01"}}
    check_inputs(tmp_path, "rte", {"dev examples": "00"}, MODELS)
    cell(tmp_path, task="sst2")
    check_inputs(tmp_path, "rte", {"dev examples": "01"}, other)
    cell(tmp_path, task="rte", model="second")
    check_inputs(tmp_path, "rte", {"dev examples": "01"}, MODELS)
    assert json.loads((tmp_path / INPUTS).read_text())["rte"]["models"] == MODELS


def test_cells_of_which_nothing_is_noted_are_accepted_and_noted(tmp_path):
    cell(tmp_path, task="rte")
    check_inputs(tmp_path, "rte", {"dev examples": "00"}, MODELS)
    with pytest.raises(ValueError, match="rte are of other data"):
        check_inputs(tmp_path, "rte", {"dev examples": "01"}, MODELS)


def test_what_a_run_did_not_need_is_compared_from_when_one_does(tmp_path):
    cell(tmp_path, task="rte")
    seen = {"dev examples": "00", "train examples": "00"}
    for data in ({"dev examples": "00"}, seen, {"dev examples": "00"}):
        check_inputs(tmp_path, "rte", data, {})
    with pytest.raises(ValueError, match=r"\(different: train examples\)"):
        check_inputs(tmp_path, "rte", {**seen, "train examples": "01"}, {})


def test_model_is_known_by_what_its_answers_depend_on(tmp_path):
    for name in ("config.json", "model.safetensors", "tokenizer.json", "trainer_state.json"):
        (tmp_path / name).write_text("as it was")
    before = model_facts(tmp_path)
    assert before["list of files"] == ["config.json", "model.safetensors", "tokenizer.json"]
    (tmp_path / "trainer_state.json").write_text("new")
    assert model_facts(tmp_path) == before
    (tmp_path / "model.safetensors").write_text("as it is!")
    changed = model_facts(tmp_path)
    assert {key for key in before if before[key] != changed[key]} == {"model.safetensors"}
