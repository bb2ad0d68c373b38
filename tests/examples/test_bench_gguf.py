"""`examples/bench_gguf.py` on numbers and texts made by hand; llama.cpp is asked where it is there."""

import importlib.util
import json
from types import ModuleType
from typing import ClassVar

import numpy as np
import pytest
from places import EXAMPLES


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_gguf", EXAMPLES / "bench_gguf.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_log_probabilities_are_normalised(bench):
    logs = bench.log_softmax(np.array([[0.0, 1000.0], [3.0, 3.0]], np.float32))
    assert logs == pytest.approx(np.array([[-1000.0, 0.0], [np.log(0.5)] * 2]), abs=1e-4)


def test_a_file_against_the_dense_one_by_hand(bench):
    """Next to (1/2, 1/2) stand (3/4, 1/4) and, once, the same; the next token is the second one."""
    dense = np.log(np.full((2, 2), 0.5, np.float32))
    found = np.log(np.array([[0.75, 0.25], [0.5, 0.5]], np.float32))
    row = bench.compare([dense.astype(np.float16)], iter([found]), [[0, 1]])
    assert row.kl == pytest.approx(np.log(4 / 3) / 4, abs=1e-3)  # of 0.5 log(4/3) and 0
    assert row.loss == pytest.approx(np.log(2), abs=1e-3)
    assert row.same == 1.0


def test_a_text_may_be_lines_of_json(bench, tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": one}) for one in ("x", "y")))
    (tmp_path / "a.txt").write_text("x\n\ny")
    assert bench.read_text(tmp_path / "a.jsonl") == bench.read_text(tmp_path / "a.txt")


def test_names_of_llama_cpps_types_are_its_own(bench):
    llama_cpp = pytest.importorskip("llama_cpp")
    assert all(hasattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{name}") for name in bench.THEIRS)


@pytest.mark.parametrize(("begins", "first"), [("true", [2]), ("false", [])])
def test_a_window_begins_as_the_models_texts_did(bench, monkeypatch, begins, first):
    class Told:
        metadata: ClassVar = {"tokenizer.ggml.add_bos_token": begins}
        token_bos = staticmethod(lambda: 2)
        tokenize = staticmethod(lambda text, add_bos: list(range(100, 100 + len(text))))

    monkeypatch.setattr(bench, "WINDOW", 4)
    model = bench.Model.__new__(bench.Model)
    model.model = Told()
    found = model.windows("some text", 8)
    rest = 4 - len(first)
    assert found == [first + list(range(100 + at, 100 + at + rest)) for at in range(0, 9 - rest, rest)]
