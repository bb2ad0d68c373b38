"""The checks that the GPU's bench starts with; those that need no CUDA are rehearsed with the bench."""

import sys

import pytest
import torch
from places import EXAMPLES

sys.path.insert(0, str(EXAMPLES))

import gpu_checks as checks


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here")
@pytest.mark.parametrize("check", [*checks.ANYWHERE, *checks.ON_CUDA], ids=lambda check: check.__name__)
def test_it_is_right_on_the_gpu(check):
    check("cuda")
