"""`examples/bench_choice.py` on small layers: its rows, its check of the answers, its count of memory."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
from places import EXAMPLES


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def choice() -> ModuleType:
    return load("bench_choice")


def test_bench_choice_prints_a_row_for_each_method(choice, monkeypatch, capsys):
    monkeypatch.setattr(choice, "peak_of_child", lambda name, shape: 4 * 320 * 384)
    choice.bench((320, 384), runs=1)
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
    assert [row[1].split(" (")[0] for row in rows] == list(choice.METHODS)
    assert {row[0] for row in rows} == {"320 x 384"}
    assert {row[5] for row in rows} == {"0.5 (1.0)"}
    assert rows[0][3] == "1.0"
    assert rows[1][4] == "1.00"
    found = re.search(r"IoU with exact (\S+)\)", rows[1][1])
    assert found is not None
    assert float(found[1]) >= choice.LEAST_OVERLAP


def test_bench_choice_does_not_time_a_wrong_answer(choice, monkeypatch):
    monkeypatch.setattr(choice, "exact", choice.magnitude)
    with pytest.raises(RuntimeError, match="block Krylov's choice has an IoU of"):
        choice.bench((320, 320), runs=1)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is counted on Linux only")
def test_bench_choice_counts_the_hessian(choice):
    copy = 4 * 1024 * 1024
    # the Gram matrix in FP32, and the Hessian, its factor and its inverse in double precision: 7 copies
    assert choice.peak_of_child("spqr", (1024, 1024)) > 5 * copy


def test_bench_choice_runs_large_layers_less_often(choice):
    assert [choice.runs_of(shape) for shape in choice.SHAPES] == [9, 9, 9, 5, 3, 3]
