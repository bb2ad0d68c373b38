"""A model keeps its dtype where the first of its parameters are salient weights, which are FP32."""

import json

import pytest
import tiny_models as tiny
import torch
from transformers import AutoModelForCausalLM

from svdq_hf import SVDQConfig, quantize_model
from svdq_hf.checkpoint.quantize import quantize_checkpoint
from svdq_hf.integrations.transformers.patches import main_dtype

CHOICES = [{}, {"lm_head": True}, {"embeddings": True}]


@pytest.fixture(params=CHOICES, ids=["layers", "head", "embedding"])
def config(request):
    return SVDQConfig(k=9, **request.param)


@pytest.fixture
def dense(config, tmp_path):
    folder = tmp_path / "dense"
    tied = not config.embeddings
    tiny.llama(tie_word_embeddings=tied).to(torch.bfloat16).save_pretrained(folder)
    return folder


def said(folder):
    return json.loads((folder / "config.json").read_text())["dtype"]


def answers(model):
    with torch.no_grad():
        return model(torch.tensor([[1, 5, 9]])).logits


def test_a_bfloat16_model_comes_back_bit_for_bit(dense, config, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=config)
    assert model.dtype == torch.bfloat16
    model.save_pretrained(tmp_path / "packed")
    assert said(tmp_path / "packed") == "bfloat16"
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert again.dtype == answers(again).dtype == torch.bfloat16
    assert torch.equal(answers(again), answers(model))


def test_streamed_it_has_the_same_config(dense, config, tmp_path):
    quantize_checkpoint(dense, tmp_path / "packed", config)
    assert said(tmp_path / "packed") == "bfloat16"


def test_quantized_in_memory_and_made_dense_again_it_keeps_its_dtype(dense, config):
    model = quantize_model(AutoModelForCausalLM.from_pretrained(dense), config)
    assert model.dtype == torch.bfloat16
    assert {weight.dtype for weight in model.dequantize().parameters()} == {torch.bfloat16}


def test_where_nothing_is_dense_salient_weights_answer():
    assert main_dtype(torch.nn.ParameterDict({"salient_values": torch.ones(2)})) == torch.float32
