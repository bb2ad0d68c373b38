"""A run tells its skipped tests, and fails for a reason that nobody listed; in workers, too."""

import subprocess
import sys

import pytest
from places import HELPERS

TESTS = """
import pytest

@pytest.mark.skipif(True, reason={reason!r})
def test_marked():
    pass

def test_inside():
    pytest.skip({reason!r})

def test_that_runs():
    pass
"""


@pytest.mark.parametrize("workers", ["0", "2"])
@pytest.mark.parametrize(
    ("reason", "options", "code", "told"),
    [
        (
            "espeak-ng reads aloud",
            ["--known-skips"],
            0,
            "   2 espeak-ng reads aloud\n     known: the speech data",
        ),
        ("too hot", ["--known-skips"], 1, "   2 too hot\n     UNKNOWN: list it in tests/helpers/skips.py"),
        ("too hot", [], 0, "1 passed, 2 skipped"),
    ],
)
def test_a_run_with_skips(reason, options, code, told, workers, tmp_path):
    (tmp_path / "conftest.py").write_text("from skips import *\n")
    (tmp_path / "test_it.py").write_text(TESTS.format(reason=reason))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-n", workers, "-p", "no:cacheprovider", *options, str(tmp_path)],
        cwd=tmp_path,
        env={"PYTHONPATH": str(HELPERS), "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert told in done.stdout
    assert "1 passed, 2 skipped" in done.stdout.splitlines()[-1]
