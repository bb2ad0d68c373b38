"""The residual stream of a decoder, found by what its tensors do; what cannot be rotated is refused."""

import pytest
import tiny_models as tiny
import torch
import transformers as hf
from torch import nn

from svdq_hf import SVDQConfig, quantize_model
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


def test_an_empty_row_of_the_embedding_hides_nothing():
    model = tiny._seeded(hf.LlamaForCausalLM, hf.LlamaConfig(**{**tiny._DECODER, "pad_token_id": 1}))
    assert not model.model.embed_tokens.weight[1].any()
    assert find_stream(model) == find_stream(tiny.llama())


@pytest.mark.parametrize(
    ("name", "reason"),
    [("embed_tokens", "0.input_layernorm reads"), ("layers.0.self_attn.v_proj", "0.self_attn.o_proj reads")],
)
def test_nothing_is_told_by_zeros(name, reason):
    model = tiny.llama()
    with torch.no_grad():
        model.model.get_submodule(name).weight.zero_()
    with pytest.raises(NotRotatable, match=f"{reason} nothing but zeros"):
        find_stream(model)


class Doubling(nn.Module):
    """A feed-forward block, one layer of which reads a copy of what the others read, times a factor."""

    def __init__(self, block, factor):
        super().__init__()
        self.block, self.factor, self.more = block, factor, nn.Linear(64, 96, bias=False)

    def forward(self, x):
        gate = self.block.act_fn(self.block.gate_proj(x)) * self.more(x * self.factor)
        return self.block.down_proj(gate * self.block.up_proj(x))


def doubling(factor):
    model = tiny.llama()
    model.model.layers[1].mlp = Doubling(model.model.layers[1].mlp, factor)
    with torch.no_grad():
        for parameter in model.model.layers[1].mlp.parameters():
            parameter.mul_(tiny.LOUD)
    return model


def test_a_layer_that_reads_a_copy_of_a_norms_output_is_refused():
    with pytest.raises(NotRotatable, match=r"mlp\.more reads a copy of what .*post_attention_layernorm"):
        find_stream(doubling(1.0))


def test_a_model_that_computes_something_else_when_rotated_is_refused():
    with pytest.raises(NotRotatable, match=r"its logits differ by .* Load the model again"):
        quantize_model(doubling(2.0), SVDQConfig.resq())


def test_the_model_is_left_as_it_was():
    model = tiny.llama().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    find_stream(model)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
