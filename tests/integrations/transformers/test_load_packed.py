"""What config.json says of a packed head and a packed embedding, and what the files hold."""

import pytest
import tiny_models as tiny
import torch
from damaged import Saved
from transformers import AutoModelForCausalLM

from svdq_hf import SVDQConfig, quantize_model

CHOICES = {"head": {"lm_head": True}, "embedding": {"embeddings": True}, "none": {}}


@pytest.fixture
def saved(request, tmp_path):
    quantize_model(tiny.llama(), SVDQConfig(k=8, **CHOICES[request.param])).save_pretrained(tmp_path)
    return Saved(tmp_path)


def said(saved, **choices):
    saved.config["quantization_config"] |= {"format_version": 4, "embeddings": False, "lm_head": False}
    saved.config["quantization_config"] |= choices
    return saved.write()


@pytest.mark.parametrize(
    ("saved", "choices", "told"),
    [
        ("head", {}, "says lm_head: false, the files hold lm_head packed"),
        ("none", {"lm_head": True}, "says lm_head: true, the files hold lm_head dense"),
        ("embedding", {}, "says embeddings: false, the files hold model.embed_tokens packed"),
    ],
    indirect=["saved"],
)
def test_a_config_that_says_otherwise_is_refused(saved, choices, told):
    with pytest.raises(ValueError, match=f"{told}.*The checkpoint is damaged"):
        AutoModelForCausalLM.from_pretrained(said(saved, **choices))


def test_two_matrices_of_a_config_that_says_tied_are_two(tmp_path):
    torch.manual_seed(0)
    model = tiny.llama(tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight.copy_(2 * model.model.embed_tokens.weight)
    quantize_model(model, SVDQConfig(k=8, lm_head=True, embeddings=True))
    model.config.tie_word_embeddings = True
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.tensor([[1, 5, 9]])
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
