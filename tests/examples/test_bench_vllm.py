"""`bench_vllm.py` of the examples with engines that only wait."""

import sys

import pytest
from places import EXAMPLES

sys.path.insert(0, str(EXAMPLES))
import bench_vllm  # examples are no package


def test_models_take_turns_and_none_sees_a_prompt_twice(monkeypatch, capsys):
    turns = []

    def seconds(engine, asked, tokens):
        turns.append((engine, [tuple(prompt) for prompt in asked]))
        return {"some/dense": 2.0, "packed": 0.5}[engine] * len(asked)

    monkeypatch.setattr(bench_vllm, "engine", lambda folder, dtype, eager: folder)
    monkeypatch.setattr(bench_vllm, "seconds", seconds)
    wanted = ["x", "some/dense", "packed", "--requests", "1", "4", "--rounds", "1", "--tokens", "8"]
    monkeypatch.setattr(sys, "argv", wanted)
    bench_vllm.main()
    table = capsys.readouterr().out.splitlines()[-4:]
    assert table[0] == "| requests at once | dense | packed |"
    assert table[2:] == ["| 1 | 4.0 (1.00) | 16.0 (4.00) |", "| 4 | 4.0 (1.00) | 16.0 (4.00) |"]
    assert [engine for engine, _ in turns] == ["some/dense", "packed"] * 4
    of_one = [prompt for engine, asked in turns if engine == "packed" for prompt in asked]
    assert len(set(of_one)) == len(of_one) == 10


def test_a_median_is_of_the_rounds_after_the_first(monkeypatch):
    took = iter([100.0, 1.0, 2.0, 4.0])
    monkeypatch.setattr(bench_vllm, "seconds", lambda *asked: next(took))
    assert bench_vllm.speeds({"one": None}, 2, 4, 3)["one"] == pytest.approx(4.0)
