"""Masked tokens: the model's own loss on them."""

import letters
import pytest
import torch
from letters import KINDS
from torch.nn import functional as F

from svdq_hf.evaluation.comparison.answers import Reference
from svdq_hf.evaluation.comparison.masked import MaskedWindows
from svdq_hf.evaluation.tasks.perplexity import masked_score


def test_loss_is_that_of_the_sweeps(tmp_path):
    torch.manual_seed(0)
    model_class, config = KINDS["masked"]
    model, tokenizer = model_class(config()).eval(), letters.tokenizer(ends=True)
    ids = torch.randint(7, 80, (60,))
    found = MaskedWindows(ids, 30, tokenizer, Reference(tmp_path))(model)
    expected = masked_score(model, ids, tokenizer, context=30)
    assert (found.n, float(found.loss.mean())) == (expected.tokens, pytest.approx(expected.loss, rel=1e-5))
    assert F.one_hot(found.block).shape == (found.n, 2)
