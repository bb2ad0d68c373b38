"""Kinds of layers whose spectrum decays: dense, LoRA's merged weight, salient weights; what is left out."""

import copy

import pytest
import tiny_models as tiny
import torch
import transformers as hf
from torch import nn

from svdq_hf import SpectralDecay, SVDQConfig, quantize_model
from svdq_hf.training.decayed_layers import decayed_layers, linear_layers

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing:FutureWarning")  # PEFT's own

CHOICES = {"tau": 0.0, "strength": 0.1}


def decayed(model, ids=None):
    """The gradients that spectral decay adds to a model, by parameter."""
    decay = SpectralDecay(model, **CHOICES)
    model(tiny.tokens() if ids is None else ids)
    decay.step()
    return {name: one.grad for name, one in model.named_parameters() if one.grad is not None}, decay


def penalty_of(weight):
    """The penalty of one layer, `[out, in]`, by autograd."""
    return 0.1 / 3 * torch.linalg.svdvals(weight.double())[0] ** 3


def check(found, expected):
    error = (found.double() - expected).norm() / expected.norm()
    assert error < 1e-4


def test_dense_layers_of_the_base_decay_and_heads_do_not():
    model = tiny.classifier().eval()
    gradients, decay = decayed(model)
    assert len(decay.layers) == 13  # six in each of two layers, and the pooler
    assert set(gradients) == {f"{name}.weight" for name in decay.layers}
    for name, gradient in gradients.items():
        weight = model.get_parameter(name).detach().clone().requires_grad_()
        penalty_of(weight).backward()
        check(gradient, weight.grad.double())


def test_a_weight_that_is_stored_transposed_decays():
    config = hf.GPT2Config(vocab_size=96, n_embd=64, n_layer=1, n_head=4, n_positions=40)
    torch.manual_seed(0)
    model = hf.GPT2LMHeadModel(config).eval()
    gradients, _ = decayed(model)
    weight = model.transformer.h[0].mlp.c_fc.weight.detach().clone().requires_grad_()
    penalty_of(weight).backward()
    check(gradients["transformer.h.0.mlp.c_fc.weight"], weight.grad.double())


def lora_model(base, **choices):
    peft = pytest.importorskip("peft", reason="needs PEFT: pip install -e '.[peft]'")
    config = peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "dense"], **choices)
    model = peft.get_peft_model(base, config).eval()
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3)
    return model


@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "quantized"])
def test_the_merged_weight_of_lora_decays_through_both_factors(quantized):
    base = tiny.classifier().eval()
    model = lora_model(quantize_model(base, SVDQConfig(k=32)) if quantized else base, use_rslora=True)
    gradients, decay = decayed(model)
    assert set(gradients) == {name for name, _ in model.named_parameters() if ".lora_" in name}
    name = "bert.encoder.layer.1.attention.self.query"
    layer = model.get_base_model().get_submodule(name)
    inner = layer.get_base_layer()
    dense = inner.dequantize() if quantized else inner.weight.detach()
    down, up = (
        part["default"].weight.detach().clone().requires_grad_() for part in (layer.lora_A, layer.lora_B)
    )
    penalty_of(dense + layer.scaling["default"] * up @ down).backward()
    check(layer.lora_A["default"].weight.grad, down.grad.double())
    check(layer.lora_B["default"].weight.grad, up.grad.double())
    with torch.no_grad():
        merged = dense + layer.scaling["default"] * up @ down
    torch.testing.assert_close(decay.layers[name].weight(), merged)


def test_other_adapters_than_plain_lora_are_refused():
    with pytest.raises(ValueError, match=r"query: spectral decay knows plain LoRA only"):
        SpectralDecay(lora_model(tiny.classifier(), use_dora=True))


def test_salient_weights_decay_at_their_positions():
    model = quantize_model(tiny.classifier().eval(), SVDQConfig(k=32))
    gradients, decay = decayed(model)
    name = "bert.encoder.layer.0.intermediate.dense"
    layer = model.get_submodule(name)
    values = layer.salient_values.detach().clone().requires_grad_()
    rows, columns = layer.salient_rows.long(), layer.salient_columns.long()
    weight = layer.dequantize().index_put((rows, columns), values)
    penalty_of(weight).backward()
    check(gradients[f"{name}.salient_values"], values.grad.double())
    assert len(decay.layers) == 13


def test_frozen_layers_are_left_out_and_a_frozen_model_is_refused():
    model = tiny.classifier()
    model.bert.encoder.layer[0].requires_grad_(False)
    assert all("layer.0" not in name for name in decayed_layers(model, None))
    with pytest.raises(ValueError, match="no linear layer that trains: is everything frozen"):
        decayed_layers(model.requires_grad_(False), None)
    assert dict(linear_layers(model))  # which are looked at all the same


def test_layers_are_chosen_as_in_modules_to_not_convert():
    chosen = decayed_layers(tiny.classifier(), ["output.dense"])
    assert len(chosen) == 4
    assert all(name.endswith("output.dense") for name in chosen)


def test_an_output_layer_and_tied_weights_are_left_out():
    tied = tiny.FAMILIES["llama-tied"].loud_model()
    assert "lm_head" not in decayed_layers(tied, None)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    assert set(decayed_layers(model, None)) == {"1"}


def test_wrappers_are_looked_through():
    model = tiny.classifier()
    names = set(decayed_layers(model, None))
    assert set(SpectralDecay(nn.DataParallel(model)).layers) == names
    assert set(SpectralDecay(torch.compile(copy.deepcopy(model), backend="eager")).layers) == names


def test_flat_parameters_are_refused_with_the_remedy():
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].weight = nn.Parameter(torch.zeros(0))
    with pytest.raises(ValueError, match=r"0: its weight is a flat or empty piece \[0\].*fully_shard"):
        decayed_layers(model, None)
