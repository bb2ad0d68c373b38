"""Freeze all, unfreeze the last block: of packed codes the layer is named, and what can train."""

import copy
import io
import re

import pytest
import tiny_experts
import tiny_models as tiny
import torch
from torch import nn
from transformers import AutoModel

from svdq_hf import SVDQConfig, SVDQLinear, mark_trainable, quantize_model
from svdq_hf.format.packed_codes import PackedCodes

CONFIG = SVDQConfig(k=9)
LAYER = "encoder.layer.1.attention.self.query"


def in_memory(folder):
    return quantize_model(tiny.bert(), CONFIG)


def while_loading(folder):
    tiny.bert().save_pretrained(folder)
    return AutoModel.from_pretrained(folder, quantization_config=CONFIG)


def loaded(folder):
    in_memory(folder).save_pretrained(folder)
    return AutoModel.from_pretrained(folder)


WAYS = {
    "in memory": in_memory,
    "while loading": while_loading,
    "loaded": loaded,
    "copied": lambda folder: copy.deepcopy(in_memory(folder)),
    "cast": lambda folder: in_memory(folder).to(torch.bfloat16),
}


def attribute(parameter):
    parameter.requires_grad = True


def unfreeze(parameters, set_it):
    for parameter in parameters:
        set_it(parameter)


SETTERS = {"method": lambda parameter: parameter.requires_grad_(), "attribute": attribute}


@pytest.mark.parametrize("setter", SETTERS)
@pytest.mark.parametrize("way", WAYS)
def test_unfreezing_a_block_in_a_loop_names_the_layer_and_the_remedy(way, setter, tmp_path):
    model, set_it = WAYS[way](tmp_path), SETTERS[setter]
    for parameter in model.parameters():
        parameter.requires_grad = False  # as every recipe begins
    block = model.encoder.layer[1]
    told = rf"{re.escape(LAYER)}: packed codes .*mark_trainable\(model\).*is_floating_point\(\)"
    with pytest.raises(ValueError, match=told):
        unfreeze(block.parameters(), set_it)
    unfreeze((one for one in block.parameters() if one.is_floating_point()), set_it)
    model(torch.tensor([[1, 2]]))[0].sum().backward()
    assert model.get_submodule(LAYER).salient_values.grad is not None


def test_a_whole_model_that_is_to_train_is_named_too():
    with pytest.raises(ValueError, match=r"codes are integers and cannot train; mark_trainable\(model\)"):
        in_memory(None).requires_grad_(True)
    assert mark_trainable(in_memory(None), show=False).total > 0


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (lambda: quantize_model(tiny_experts.build("qwen3-moe"), CONFIG), "mlp.experts.gate_up_proj"),
        (lambda: quantize_model(tiny.bert(), CONFIG.replace(embeddings=True)), "embeddings.word_embeddings"),
        (lambda: quantize_model(nn.Sequential(nn.Linear(64, 8)), CONFIG), "0"),
    ],
    ids=["experts", "embedding", "module"],
)
def test_every_kind_of_packed_codes_has_a_name(model, name):
    packed = [one for one in model().parameters() if not one.is_floating_point()]
    assert {type(one) for one in packed} == {PackedCodes}
    assert any(one.layer.endswith(name) for one in packed)


def test_to_torch_it_is_a_parameter_as_any_other():
    model = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 8))
    quantize_model(model, SVDQConfig(k=4))
    x = torch.randn(3, 64)
    before = model(x)
    assert torch.equal(torch.compile(model, backend="aot_eager", fullgraph=True)(x), before)
    assert torch.equal(torch.export.export(model, (x,)).module()(x), before)
    assert {type(one) for one in model.state_dict().values()} == {torch.Tensor}
    torch.save(model, file := io.BytesIO())
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), before)
    layer = model[0]
    assert isinstance(layer, SVDQLinear)
    assert layer.weight.requires_grad is False
    assert layer.weight.requires_grad_(False) is layer.weight


def test_what_is_wanted_of_new_codes_is_refused_too():
    with pytest.raises(ValueError, match="a quantized layer: packed codes"):
        PackedCodes(torch.zeros(2, 32, dtype=torch.int8), requires_grad=True)


def test_plain_inference_stays_the_shortest_way():
    from svdq_hf.kernels import cpu_direct

    layer = quantize_model(nn.Sequential(nn.Linear(64, 8)), CONFIG)[0]
    plain = SVDQLinear(64, 8, CONFIG.scheme)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(2, 64)
    with torch.no_grad():
        ways = [
            cpu_direct.linear(x, *one.stored_and_bias(), one.in_features, one.group) for one in (layer, plain)
        ]
    assert [way is None for way in ways] in ([False, False], [True, True])  # without the library: neither
    assert torch.equal(layer(x), plain(x))
