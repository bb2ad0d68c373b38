"""`examples/bench_pqi.py` on a tiny model: its rows, its rules, and that a run goes on."""

import importlib.util
import json
import sys

import letters
import pytest
from places import ROOT


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_pqi", ROOT / "examples" / "bench_pqi.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pqi")
    letters.saved("causal", folder / "tiny")
    (folder / "text.txt").write_text(letters.QUICK * 5)
    return folder


def run(bench, given, monkeypatch, *words):
    model = ["--model", str(given / "tiny"), "--text", str(given / "text.txt"), "--length", "20"]
    monkeypatch.setattr(sys, "argv", ["bench_pqi.py", str(given / "out"), *words, *model])
    bench.main()
    return [json.loads(line) for line in (given / "out" / "pqi.jsonl").read_text().splitlines()]


def test_a_run_goes_on_and_the_table_has_its_rules(bench, given, monkeypatch, capsys):
    places = [0.0, 0.25, 0.75, 1.0, *bench.places(8)]
    monkeypatch.setattr(bench, "all_places", lambda: places[:3])
    assert len(run(bench, given, monkeypatch, "sum", "--grid", "default", "--samples", "2")) == 3
    monkeypatch.setattr(bench, "all_places", lambda: places)
    rows = run(bench, given, monkeypatch, "sum", "--grid", "default", "--samples", "2")
    assert [row["place"] for row in rows] == places
    capsys.readouterr()
    run(bench, given, monkeypatch, "table")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| tiny")]
    assert [line.split(" | ")[3] for line in lines] == ["midpoint, 8", "Taylor"]
    change = rows[3]["loss"] - rows[0]["loss"]
    assert sum(row["slope"] for row in rows[4:]) / 8 == pytest.approx(change, rel=0.05)


def test_choices_are_made_on_one_text_and_scored_on_another(bench, given, monkeypatch, capsys):
    held = ["--held", str(given / "text.txt"), "--samples", "2", "--scored", "3"]
    methods = ["--method", "nothing salient", "best(), ReQuant", bench.SIGNED]
    rows = [
        row for row in run(bench, given, monkeypatch, "choice", *held, *methods) if row["part"] == "choice"
    ]
    assert [row["method"] for row in rows] == ["dense", "nothing salient", "best(), ReQuant", bench.SIGNED]
    assert all(len(row["losses"]) == 3 for row in rows)
    assert rows[1]["bits"] < rows[2]["bits"] == rows[3]["bits"] < rows[0]["bits"] == 32
    capsys.readouterr()
    run(bench, given, monkeypatch, "table")
    assert "best(), ReQuant" in capsys.readouterr().out


def test_cost_counts_memory_above_the_models(bench, given, monkeypatch):
    row = run(bench, given, monkeypatch, "cost", "--samples", "2", "--steps", "1")[-1]
    assert row["largest"] < row["weights"] < row["parameters"]
    assert row["cpu_seconds"] >= 0
