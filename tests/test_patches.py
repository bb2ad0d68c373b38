"""What other libraries do where svdq_hf changes nothing of theirs: it is needed while these pass."""

import pytest
import tiny_models as tiny
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from svdq_hf import SVDQConfig, SVDQLinear, quantize_model
from svdq_hf.integrations.transformers import load, load_dense, patches
from svdq_hf.nn.embedding import TiedEmbedding
from svdq_hf.quantize import head

CONFIG = SVDQConfig(k=9)
LAYER = "model.layers.0.self_attn.q_proj"


def saved(folder, **choices):
    torch.manual_seed(0)
    tiny.llama(**choices).save_pretrained(folder)
    return folder


def test_transformers_takes_a_salient_weight_for_the_models_dtype():
    model = tiny.llama(tie_word_embeddings=False).to(torch.bfloat16)
    model = quantize_model(model, SVDQConfig(k=9, embeddings=True))
    assert patches.TRANSFORMERS_DTYPE.fget(model) == torch.float32
    assert model.dtype == torch.bfloat16


def test_transformers_rounds_a_weight_before_it_is_quantized(tmp_path, monkeypatch):
    def salient(folder):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=CONFIG)
        return model.get_submodule(LAYER).salient_values

    folder = saved(tmp_path)
    exact = salient(folder)
    monkeypatch.setattr(load_dense, "load_exactly", lambda model, keys: lambda: None)
    rounded = salient(folder)
    assert torch.equal(rounded, rounded.bfloat16().float())
    assert not torch.equal(exact, exact.bfloat16().float())


def test_transformers_joins_packed_parts_on_save(tmp_path, monkeypatch):
    monkeypatch.setattr(load, "keep_own_names", lambda model: None)
    model = quantize_model(tiny.dinov2(), CONFIG)
    model.save_pretrained(tmp_path)
    names = set(load_file(tmp_path / "model.safetensors"))
    assert "encoder.layer.0.mlp.weights_in.weight" in names  # up and gate, one below the other
    assert "encoder.layer.0.mlp.up_proj.weight" not in names


def test_transformers_ties_what_is_packed(tmp_path, monkeypatch):
    folder = saved(tmp_path / "dense", tie_word_embeddings=True)
    model = quantize_model(AutoModelForCausalLM.from_pretrained(folder), SVDQConfig(k=9, lm_head=True))
    assert isinstance(model.get_input_embeddings(), TiedEmbedding)
    model.save_pretrained(tmp_path / "packed")
    monkeypatch.setattr(head, "_untie", lambda model, modules: None)
    with pytest.raises((AttributeError, KeyError, ValueError)):
        AutoModelForCausalLM.from_pretrained(tmp_path / "packed")


@pytest.fixture
def lora():
    return pytest.importorskip("peft", reason="needs PEFT: pip install 'svdq_hf[peft]'").LoraConfig(r=2)


def test_peft_has_no_layer_for_a_quantized_one(lora):
    from peft.tuners.lora.layer import dispatch_default

    layer = SVDQLinear(64, 64)
    assert dispatch_default.__wrapped__(layer, "default", config=lora, r=2, lora_alpha=2) is None
    assert dispatch_default(layer, "default", config=lora, r=2, lora_alpha=2) is not None


def test_peft_does_not_count_quantized_layers_among_all_linear(lora):
    from peft.tuners.tuners_utils import _maybe_include_all_linear_layers as include

    model = quantize_model(tiny.llama(), CONFIG)
    lora.target_modules = "all-linear"
    assert LAYER not in include.__wrapped__(lora, model).target_modules
    lora.target_modules = "all-linear"
    assert LAYER in include(lora, model).target_modules
