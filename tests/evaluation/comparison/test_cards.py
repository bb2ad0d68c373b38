"""Model cards that say what was measured: written, kept by what writes the card later, never stale."""

import json
import shutil

import letters
import pytest
from transformers import AutoModelForCausalLM

from svdq_hf import SVDQConfig, quantize_model
from svdq_hf.card import write_card
from svdq_hf.evaluation import compare
from svdq_hf.hub.measured import MEASURED, TITLE, measured_lines, remember

QUICKLY = {"speed": False, "tokens": 100, "context": 32}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cards")
    dense = letters.saved("causal", folder / "dense")
    model = quantize_model(AutoModelForCausalLM.from_pretrained(dense), SVDQConfig(k=4))
    model.save_pretrained(folder / "bare")
    (folder / "bare" / "README.md").write_text("# Mine\n\nMy words.\n")
    return folder


def figures(readme):
    section = readme.partition(TITLE)[2].partition("\n## ")[0].partition("<!--")[0]
    rows = (line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("|"))
    return {row[0]: row[1] for row in rows if len(row) == 2}


def test_a_card_says_what_was_measured_and_keeps_its_users_words(place, tmp_path):
    folder = shutil.copytree(place / "bare", tmp_path / "mine")
    result = compare(place / "dense", folder, card=True, **QUICKLY)
    assert result.cards == [str(folder / "README.md")]
    text = (folder / "README.md").read_text()
    assert text.count("My words.") == text.count(TITLE) == 1
    assert "Beside `dense`, on the text that comes along, context 32:" in text
    found, (ours,) = figures(text), result.others
    assert found["scored tokens"] == "100"
    assert found["change of loss"].startswith(f"{ours.quality.change.value:+.2g}"[:4])
    assert "(95 %: " in found["mean KL"]
    stored = json.loads((folder / MEASURED).read_text())
    assert stored[0]["values"]["kl"]["value"] == ours.quality.kl.value
    again = compare(place / "dense", folder, card=True, **{**QUICKLY, "context": 16})
    assert again.cards == result.cards
    text = (folder / "README.md").read_text()
    assert text.count(TITLE) == 1
    assert ("context 32:" in text, "context 16:" in text) == (True, True)


def test_a_card_that_is_written_anew_still_says_it(place, tmp_path):
    folder = shutil.copytree(place / "bare", tmp_path / "mine")
    remember(folder, {"reference": "dense", "measured_on": "a text", "figures": {"mean KL": "0.1 | <b>"}})
    write_card(folder, repo_id="me/mine")
    text = (folder / "README.md").read_text()
    assert figures(text)["mean KL"] == "0.1 ? ?b?"
    assert "My words." in text
    assert "me/mine" in text


def test_figures_of_other_weights_and_damaged_ones_are_left_out(place, tmp_path, caplog):
    folder = shutil.copytree(place / "bare", tmp_path / "mine")
    remember(folder, {"reference": "dense", "measured_on": "a text", "figures": {"mean KL": "0.1"}})
    assert measured_lines(folder)[0] == TITLE
    model = quantize_model(AutoModelForCausalLM.from_pretrained(place / "dense"), SVDQConfig(k=9))
    model.save_pretrained(folder)
    assert measured_lines(folder) == []
    (folder / MEASURED).write_text("{")
    assert measured_lines(folder) == []
    assert "damaged, and left out of the card" in caplog.text
