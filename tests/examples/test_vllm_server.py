"""`vllm_server.py` of the examples against a stand-in of vLLM's server."""

import sys

import pytest
from places import EXAMPLES, HELPERS

sys.path.insert(0, str(EXAMPLES))
from vllm_server import PYTHON, VllmServer  # examples are no package


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
