"""Masked tokens: which, between which ends, and none in a window that is too short."""

import letters
import pytest
import torch

from svdq_hf.evaluation.tasks.masking import masked_window
from svdq_hf.evaluation.tasks.perplexity import masked_score


def test_every_seventh_token_is_hidden_and_no_end():
    ids, tokenizer = torch.arange(10, 31), letters.tokenizer(ends=True)
    found = masked_window(ids, tokenizer)
    assert found.place.tolist() == [4, 11, 18]
    assert found.wanted.tolist() == [13, 20, 27]
    assert (found.hidden[0] == tokenizer.mask_token_id).nonzero().flatten().tolist() == [4, 11, 18]
    assert found.hidden[0, [0, -1]].tolist() == [tokenizer.cls_token_id, tokenizer.sep_token_id]


def test_a_tokenizer_without_a_mask_is_refused():
    with pytest.raises(ValueError, match="has no mask token"):
        masked_window(torch.arange(9), letters.tokenizer())


@pytest.mark.parametrize("left", range(1, 8))
def test_a_text_may_end_in_a_window_of_any_length(left):
    torch.manual_seed(0)
    model_class, config = letters.KINDS["masked"]
    model, tokenizer = model_class(config()).eval(), letters.tokenizer(ends=True)
    window = masked_window(torch.arange(10, 10 + left), tokenizer)
    assert window.place.dtype == torch.int64
    assert len(window.wanted) == len(window.place) == (left > 3)
    found = masked_score(model, torch.randint(7, 80, (20 + left,)), tokenizer, context=20)
    assert found.tokens == 3 + (left > 3)
