"""The checks that the GPU's bench starts with: those that run anywhere here, all of them where CUDA is."""

import sys

import pytest
import torch
from places import EXAMPLES

sys.path.insert(0, str(EXAMPLES))

import gpu_checks as checks


@pytest.mark.parametrize("check", checks.ON_CUDA, ids=lambda check: check.__name__)
def test_what_needs_cuda(check, device):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device is here")
    check(device)


@pytest.mark.parametrize("check", checks.ANYWHERE, ids=lambda check: check.__name__)
def test_what_runs_anywhere(check, device):
    if device == "cpu" and check is checks.check_products:
        pytest.skip("nothing new in the interpreter: test_linear.py has it in small")
    with checks.triton_first():
        check(device)
