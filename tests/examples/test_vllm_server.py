"""`vllm_server.py` and `bench_vllm.py` of the examples against a stand-in of vLLM's server."""

import sys

import pytest
from places import EXAMPLES, HELPERS

sys.path.insert(0, str(EXAMPLES))
import bench_vllm  # examples are no package
from vllm_server import PYTHON, VllmServer


@pytest.fixture(autouse=True)
def stand_in(monkeypatch, tmp_path):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {HELPERS / "vllm_server_stand_in.py"} "$@"\n')
    python.chmod(0o755)
    monkeypatch.setenv(PYTHON, str(python))


def test_a_server_is_asked_and_stopped():
    with VllmServer("folder") as server:
        assert server.complete([5, 6], 3)["token_ids"] == [2, 3, 4]
        assert server.complete("four", 1)["text"] == "4"
        assert [piece["token_ids"] for piece in server.stream([5], 2)] == [[1], [2]]
        assert server.metric("vllm:requests") == 5
        assert server.answers()
    assert not server.answers()
    assert server.process.returncode == 0


def test_a_server_that_does_not_start_says_why():
    with pytest.raises(RuntimeError, match="did not start:\nno such model"), VllmServer("absent"):
        pass


def test_bench_has_a_row_for_each_folder(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x", "some/dense", "packed", "--requests", "1", "4", "--rounds", "1"])
    bench_vllm.main()
    *_, head, _, dense, packed = capsys.readouterr().out.splitlines()
    assert head == "| folder | 1 at once | 4 at once |"
    assert dense.startswith("| dense | ")
    assert dense.count("(1.00)") == 2
    assert packed.startswith("| packed | ")


def test_row_has_ratios_to_the_base():
    assert bench_vllm.row("name", [30.0, 10.0], [20.0, 40.0]) == "| name | 30.0 (1.50) | 10.0 (0.25) |"
