"""Where the Triton kernels run: on a GPU, or in Triton's interpreter, which must be asked for before a start.

`TRITON_INTERPRET=1 pytest tests/kernels/triton` runs the tests here; in a run of all tests
`tests/kernels/test_triton.py` does it, in a process of its own.
"""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(scope="session")
def device() -> str:
    """The device that kernels run on."""
    pytest.importorskip("triton", reason="Triton is not installed")
    if not INTERPRETED and not torch.cuda.is_available():
        pytest.skip("Triton's interpreter has a process of its own")
    return "cpu" if INTERPRETED else "cuda"
