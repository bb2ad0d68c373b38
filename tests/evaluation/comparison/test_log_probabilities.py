"""Log-probabilities in half precision: the divergence is the exact one, and 0 from oneself."""

import pytest
import torch
from torch.nn import functional as F

from svdq_hf.evaluation.comparison.log_probabilities import (
    divergences,
    divergences_and_agreement,
    log_probabilities,
)

FLOOR = 1e-5
"""What half precision leaves: spacing 2**-8 at -5, so about (2**-9)**2 / 2 = 2e-6 for each of two sides."""


def test_divergence_is_the_kl_of_the_reference():
    reference, other = torch.randn(2, 200, 50, generator=torch.Generator().manual_seed(0)).unbind()
    found = divergences(log_probabilities(reference), other)
    log_p, log_q = (F.log_softmax(logits.double(), -1) for logits in (reference, other))
    expected = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=FLOOR)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_model_is_at_exactly_0_from_itself(dtype):
    logits = (5 * torch.randn(150, 40)).to(dtype)
    kl, same = divergences_and_agreement(log_probabilities(logits), logits)
    assert kl.tolist() == [0.0] * 150
    assert same.all()


def test_a_token_that_a_model_excludes_is_no_nan():
    logits = torch.randn(3, 5)
    logits[:, 2] = -torch.inf
    other = logits.roll(1, 0)
    found = divergences(log_probabilities(logits), other)
    assert torch.isfinite(found).all()
    expected = divergences(log_probabilities(logits[:, [0, 1, 3, 4]]), other[:, [0, 1, 3, 4]])
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=FLOOR)


def test_agreement_is_about_the_likeliest_answer():
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 0.0]])
    other = torch.tensor([[0.0, 9.0, 1.0], [0.0, 3.0, 0.0]])
    assert divergences_and_agreement(log_probabilities(logits), other)[1].tolist() == [True, False]
