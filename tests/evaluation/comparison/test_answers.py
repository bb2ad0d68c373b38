"""Answers beside a reference's: what is observed, in which blocks, and what is refused."""

import pytest
import torch
from torch.nn import functional as F

from svdq_hf.evaluation.comparison.answers import Answers, Reference, joined


def answers(shift=0.0, classes=5, wanted=True):
    """Two inputs of 70 and 3 positions."""
    made = torch.Generator().manual_seed(0)
    logits = [torch.randn(n, classes, generator=made) for n in (70, 3)]
    right = [torch.arange(n) % classes if wanted else None for n in (70, 3)]
    return [
        Answers(one + shift * torch.arange(classes), told) for one, told in zip(logits, right, strict=True)
    ]


@pytest.fixture
def reference(tmp_path):
    return Reference(tmp_path)


def test_the_first_model_is_the_reference_of_the_second(reference):
    first, second = reference.observe(answers()), reference.observe(answers(0.5))
    assert first.n == second.n == 73
    assert first.kl.tolist() == [0.0] * 73
    assert first.same.all()
    assert (second.kl >= 0).all()
    assert second.kl.sum() > 0
    assert 0 < second.same.sum() < 73


def test_losses_and_right_answers_are_those_of_the_logits(reference):
    found, told = reference.observe(answers()), answers()
    logits, wanted = torch.cat([one.logits for one in told]), torch.cat([one.wanted for one in told])
    torch.testing.assert_close(found.loss, F.cross_entropy(logits, wanted, reduction="none").double())
    assert found.right.tolist() == (logits.argmax(1) == wanted).tolist()


def test_blocks_are_of_64_positions_and_end_with_the_input(reference):
    assert reference.observe(answers()).block.tolist() == [0] * 64 + [1] * 6 + [2] * 3


def test_without_right_answers_there_is_no_loss(reference):
    found = reference.observe(answers(wanted=False))
    assert (found.loss, found.right) == (None, None)
    assert found.n == 73


def test_a_nan_and_other_classes_are_refused(reference):
    reference.observe(answers())
    with pytest.raises(ValueError, match="among 6 answers, the reference among 5"):
        reference.observe(answers(classes=6))
    broken = answers()
    broken[1].logits[0, 0] = torch.nan
    with pytest.raises(ValueError, match="have a NaN"):
        reference.observe(broken)


def test_nothing_is_too_short():
    with pytest.raises(ValueError, match="the text is too short"):
        joined([])
