"""Quantizing inside of torch.inference_mode(): the model is as any other, and trains."""

import pytest
import tiny_models as tiny
import torch
from transformers import AutoModelForCausalLM

from svdq_hf import SVDQConfig, quantize_model
from svdq_hf.integrations.transformers.inference_mode import make_trainable

CHOICES = [{}, {"lm_head": True}, {"lm_head": True, "embeddings": True}]
IDS = torch.tensor([[1, 5, 9]])


@pytest.fixture(params=CHOICES, ids=["layers", "head", "ends"])
def config(request):
    return SVDQConfig(k=9, **request.param)


@pytest.fixture
def folder(config, tmp_path):
    tiny.llama(tie_word_embeddings=not config.embeddings).save_pretrained(tmp_path)
    return tmp_path


def load(folder, **choices):
    return AutoModelForCausalLM.from_pretrained(folder, **choices)


@pytest.mark.parametrize("way", ["on load", "in memory"])
def test_it_is_the_same_model_and_trains(way, config, folder):
    expected = load(folder, quantization_config=config)
    if way == "in memory":
        model = load(folder)
        with torch.inference_mode():
            quantize_model(model, config)
    else:
        with torch.inference_mode():
            model = load(folder, quantization_config=config)
    assert tiny.different_tensors(model, expected) == []
    assert [name for name, one in model.named_parameters() if one.is_inference()] == []
    model(IDS).logits.sum().backward()
    assert any(one.grad is not None for name, one in model.named_parameters() if "salient" in name)


def test_synthetic_batches_are_made(folder):
    model = load(folder)
    with torch.inference_mode():
        quantize_model(model, SVDQConfig(k=9, error_feedback="synthetic"))
    model(IDS).logits.sum().backward()


def test_what_is_tied_stays_tied():
    with torch.inference_mode():
        model = tiny.llama(tie_word_embeddings=True)
    make_trainable(model)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert not model.lm_head.weight.is_inference()
