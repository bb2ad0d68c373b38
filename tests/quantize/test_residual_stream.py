"""The residual stream of a decoder, found by what its tensors do; what cannot be rotated is refused."""

import pytest
import tiny_models as tiny
import torch
import transformers as hf
from torch import nn

from svdq_hf.quantize.residual_stream import Heads, NotRotatable, find_stream

REFUSED = {
    "gemma3": (
        hf.Gemma3ForCausalLM,
        hf.Gemma3TextConfig,
        "post_attention_layernorm normalizes the",
    ),
    "olmo2": (hf.Olmo2ForCausalLM, hf.Olmo2Config, "q_norm normalizes the output of"),
    "granite": (hf.GraniteForCausalLM, hf.GraniteConfig, "post_attention_layernorm reads something else"),
    "phi3": (hf.Phi3ForCausalLM, hf.Phi3Config, "o_proj: no layer beside it makes the values"),
    "mixtral": (hf.MixtralForCausalLM, hf.MixtralConfig, "layers.1.input_layernorm reads something else"),
    "cohere": (hf.CohereForCausalLM, hf.CohereConfig, "is no RMSNorm"),
    "headless": (hf.LlamaModel, hf.LlamaConfig, "no linear layer reads norm"),
    "t5": (hf.T5ForConditionalGeneration, hf.T5Config, "does not run as a decoder on one token"),
    "bert": (hf.BertModel, hf.BertConfig, "embeddings.LayerNorm reads something else"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_rotated_is_refused_in_one_line_that_names_the_module(name):
    kind, config, reason = REFUSED[name]
    choices = {"residual_multiplier": 0.5} if name == "granite" else {}
    model = tiny._seeded(kind, config(**tiny._DECODER, **choices))
    with pytest.raises(NotRotatable, match=reason) as told:
        find_stream(model)
    assert "\n" not in str(told.value)


def test_a_llama_is_norms_readers_writers_and_heads():
    stream = find_stream(tiny.llama())
    attention, mlp, *_ = stream.blocks
    assert len(stream.blocks) == 4
    assert (stream.embedding, stream.norm, stream.heads) == ("model.embed_tokens", "model.norm", ("lm_head",))
    assert attention.readers == tuple(f"model.layers.0.self_attn.{one}_proj" for one in "qkv")
    assert attention.heads == Heads("model.layers.0.self_attn.v_proj", 2, 16)
    assert mlp.readers == ("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj")
    assert (mlp.writer, mlp.heads) == ("model.layers.0.mlp.down_proj", None)


def test_a_model_that_is_no_decoder_is_refused():
    with pytest.raises(NotRotatable, match="Sequential has no input embedding"):
        find_stream(nn.Sequential(nn.Linear(8, 8)))


def test_a_matrix_that_does_not_run_with_every_token_is_refused():
    model = tiny.llama()
    model.model.layers[1].mlp.spare = nn.Linear(64, 64)
    with pytest.raises(NotRotatable, match=r"layers\.1\.mlp\.spare\.weight is of no linear layer that runs"):
        find_stream(model)


def test_a_layer_that_runs_twice_is_refused():
    model = tiny.llama()
    model.model.layers[1].mlp.down_proj = model.model.layers[0].mlp.down_proj
    with pytest.raises(NotRotatable, match="runs more than once"):
        find_stream(model)


def test_the_model_is_left_as_it_was():
    model = tiny.llama().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    find_stream(model)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
