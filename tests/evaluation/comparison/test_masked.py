"""Masked tokens: which, and the model's own loss on them."""

import letters
import pytest
import torch
from letters import KINDS
from torch.nn import functional as F

from svdq_hf.evaluation.comparison.answers import Reference
from svdq_hf.evaluation.comparison.masked import MaskedWindows, masked_window
from svdq_hf.evaluation.tasks.perplexity import masked_score


def test_every_seventh_token_is_hidden_and_no_end():
    ids, tokenizer = torch.arange(10, 31), letters.tokenizer(ends=True)
    found = masked_window(ids, tokenizer)
    assert found.place.tolist() == [4, 11, 18]
    assert found.wanted.tolist() == [13, 20, 27]
    assert (found.hidden[0] == tokenizer.mask_token_id).nonzero().flatten().tolist() == [4, 11, 18]
    assert found.hidden[0, [0, -1]].tolist() == [tokenizer.cls_token_id, tokenizer.sep_token_id]


def test_loss_is_that_of_the_sweeps(tmp_path):
    torch.manual_seed(0)
    model_class, config = KINDS["masked"]
    model, tokenizer = model_class(config()).eval(), letters.tokenizer(ends=True)
    ids = torch.randint(7, 80, (60,))
    found = MaskedWindows(ids, 30, tokenizer, Reference(tmp_path))(model)
    expected = masked_score(model, ids, tokenizer, context=30)
    assert (found.n, float(found.loss.mean())) == (expected.tokens, pytest.approx(expected.loss, rel=1e-5))
    assert F.one_hot(found.block).shape == (found.n, 2)


def test_a_tokenizer_without_a_mask_is_refused():
    with pytest.raises(ValueError, match="has no mask token"):
        masked_window(torch.arange(9), letters.tokenizer())
