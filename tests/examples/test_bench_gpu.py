"""The bench for GPUs is rehearsed: in Triton's interpreter, which must be asked for before Python starts."""

import subprocess
import sys

import pytest
from places import EXAMPLES

from svdq_hf.kernels.triton import backend

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not backend.is_here(), reason="Triton is not installed"),
]


def rehearsed(script):
    command = [sys.executable, EXAMPLES / script, "--rehearse"]
    told = subprocess.run(command, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr[-3000:]
    return told.stdout


def test_the_bench_checks_first_and_prints_its_tables():
    lines = rehearsed("bench_gpu.py").splitlines()
    assert "times mean nothing" in lines[0]
    assert [line.split(",")[0] for line in lines if line.startswith("right")][:2] == [
        "right: backend",
        "right: same bits",
    ]
    for start in (
        "| 64 x 128 | 1 tokens",
        "| dense bf16, us |",
        "| svdq |",
        "| svdq, head dense |",
        "quantizing: ",
    ):
        assert any(line.startswith(start) for line in lines), start
    assert lines[-1].endswith(" s in all")


def test_tuning_prints_an_entry_of_the_file_of_shapes():
    assert rehearsed("tune_gpu.py").splitlines()[-1].startswith('{"cpu": {"few": {"rows": 8, ')
