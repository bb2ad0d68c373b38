"""`bench_resq.py` of the examples: a row for each method, and figures that are kept."""

import json
import sys

import pytest
import tiny_models as tiny
from places import EXAMPLES
from transformers import AutoTokenizer

from svdq_hf.demo import default_model

sys.path.insert(0, str(EXAMPLES))
import bench_resq  # examples are no package


@pytest.fixture
def folder(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(default_model())
    model = tiny.llama(vocab_size=len(tokenizer), max_position_embeddings=64)
    for parameter in model.model.layers.parameters():
        parameter.data.mul_(tiny.LOUD if parameter.ndim == 2 else 1)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text").write_text("The quick brown fox jumps over the lazy dog, and it rains. " * 30)
    return tmp_path


def run(monkeypatch, folder, *rows):
    sizes = ["--windows", "2", "--length", "48", "--samples", "4", "--json", str(folder / "figures.json")]
    given = [str(folder / "model"), *sizes, "--text", str(folder / "text")]
    given += ["--calibration", str(folder / "text"), "--rows", *rows]
    monkeypatch.setattr(sys, "argv", ["bench_resq.py", *given])
    monkeypatch.setattr(bench_resq, "FED", 16)  # the last tokens read a cache that has packed the first
    bench_resq.main()
    return json.loads((folder / "figures.json").read_text())


def test_every_method_has_a_row(monkeypatch, folder, capsys):
    figures = run(monkeypatch, folder, *bench_resq.ROWS)
    assert list(figures) == list(bench_resq.ROWS)
    assert figures["16"]["kl"] == figures["16"]["loss"] == 0
    assert all(figures[name]["kl"] > 0 for name in bench_resq.ROWS if name != "16")
    assert figures["w4"]["kl"] < figures["quarot"]["kl"]
    assert len(capsys.readouterr().out.splitlines()) == len(bench_resq.ROWS) + 1


def test_rows_that_are_there_already_stay(monkeypatch, folder):
    run(monkeypatch, folder, "16")
    assert list(run(monkeypatch, folder, "resq-weights")) == ["16", "resq-weights"]
