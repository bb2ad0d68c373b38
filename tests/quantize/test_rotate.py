"""A rotated model computes what it computed before."""

import pytest
import tiny_models as tiny
import torch
import transformers as hf

from svdq_hf.quantize.residual_stream import find_stream
from svdq_hf.quantize.rotate import Bases, fold_norms, rotate

FAMILIES = {
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig, {"tie_word_embeddings": True}),
    "llama-biases": (hf.LlamaForCausalLM, hf.LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "classifier": (hf.LlamaForSequenceClassification, hf.LlamaConfig, {}),
    "qwen2": (hf.Qwen2ForCausalLM, hf.Qwen2Config, {}),
    "qwen3": (hf.Qwen3ForCausalLM, hf.Qwen3Config, {}),
    "mistral": (hf.MistralForCausalLM, hf.MistralConfig, {}),
    "smollm3": (hf.SmolLM3ForCausalLM, hf.SmolLM3Config, {}),
    "gemma": (hf.GemmaForCausalLM, hf.GemmaConfig, {}),  # its norms multiply by 1 + weight
}


def orthogonal(*shape):
    return torch.linalg.qr(torch.randn(*shape, dtype=torch.float64))[0]


def drawn_bases(stream, hidden):
    heads = [block.heads for block in stream.blocks if block.heads]
    return Bases(
        orthogonal(hidden, hidden), {one.value: orthogonal(one.count, one.size, one.size) for one in heads}
    )


def model_of(family):
    """A model of which no norm, bias or layer can be left out unseen."""
    kind, config, choices = FAMILIES[family]
    model = tiny._seeded(kind, config(**{**tiny._DECODER, **choices}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
            else:
                parameter.mul_(tiny.LOUD)
    return model


def logits(model):
    with torch.no_grad():
        return model(input_ids=tiny.tokens()).logits


def apart(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("family", FAMILIES)
def test_folding_and_rotating_leave_the_logits(family):
    model = model_of(family)
    before, stream = logits(model), find_stream(model)
    fold_norms(model, stream)
    assert apart(logits(model), before) < 1e-5
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rotate(model, stream, drawn_bases(stream, model.config.hidden_size))
    assert apart(logits(model), before) < 1e-5
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, weights[name])}
    matrices = {name for name, tensor in weights.items() if tensor.ndim == 2}
    assert matrices <= changed


@pytest.mark.parametrize("part", ["stream", "values"])
def test_each_rotation_by_itself_leaves_the_logits(part):
    model = model_of("qwen2")
    before, stream = logits(model), find_stream(model)
    fold_norms(model, stream)
    drawn = drawn_bases(stream, model.config.hidden_size)
    rotate(model, stream, Bases(drawn.stream) if part == "stream" else Bases(values=drawn.values))
    assert apart(logits(model), before) < 1e-5


def test_folded_norms_have_no_weight_of_their_own():
    model = model_of("gemma")
    stream = find_stream(model)
    assert stream.offset == 1
    fold_norms(model, stream)
    assert all((model.get_submodule(norm).weight == 0).all() for norm, _ in stream.reads)
    assert find_stream(model) == stream


def test_a_tied_head_gets_a_matrix_of_its_own_and_stays_untied_in_files(tmp_path):
    model = model_of("llama")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    stream = find_stream(model)
    fold_norms(model, stream)
    rotate(model, stream, drawn_bases(stream, 64))
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.tie_word_embeddings is False
    assert torch.equal(logits(again), logits(model))


def test_a_bfloat16_model_is_rotated_in_float64_and_rounded_once():
    model = model_of("llama")
    half = model_of("llama").to(torch.bfloat16)
    for one in (model, half):
        stream = find_stream(one)
        torch.manual_seed(1)
        fold_norms(one, stream)
        rotate(one, stream, drawn_bases(stream, 64))
    name = "model.layers.0.mlp.down_proj.weight"
    torch.testing.assert_close(
        half.state_dict()[name].float(), model.state_dict()[name], rtol=2**-6, atol=2e-3
    )
