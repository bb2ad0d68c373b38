"""A layer that rounds its activations: its product, its dtypes, what it refuses."""

import copy

import pytest
import torch
from torch import nn

from svdq_hf import SVDQConfig
from svdq_hf.core.activations import round_tokens
from svdq_hf.nn.integer_linear import SVDQIntegerLinear
from svdq_hf.quantize.layer import quantized_layer

INPUTS = {"q": 1, "o": 3, "down": "hadamard"}


def layer_of(name, bias=True, **choices):
    torch.manual_seed(0)
    dense = nn.Linear(192, 24, bias=bias)
    config = SVDQConfig.resq(layer_inputs=INPUTS, **choices)
    return dense, quantized_layer(name, dense, config)


every_layer = pytest.mark.parametrize("name", INPUTS)


def as_rounded(layer, x):
    """The inputs that the layer really multiplies, as they came."""
    own = layer.activations
    arranged, low = own.arranged(x), layer.scheme.columns(layer.in_features)[0]
    found = []
    for part, bits in ((arranged[:, :low], own.bits), (arranged[:, low:], 8)):
        if part.shape[1]:
            codes, scale, zero = round_tokens(part, bits)
            found.append(scale * (codes.float() - zero.float()))
    return own.restored(torch.cat(found, 1))


@every_layer
def test_the_output_is_that_of_the_rounded_inputs_and_the_dequantized_weight(name):
    dense, layer = layer_of(name)
    assert type(layer) is SVDQIntegerLinear
    x = torch.randn(2, 5, 192)
    found = layer(x)
    rounded = as_rounded(layer, x.reshape(-1, 192))
    expected = nn.functional.linear(rounded, layer.dequantize(), dense.bias).view(2, 5, 24)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (found - dense(x)).norm() / dense(x).norm() < 0.25


@every_layer
def test_a_token_gets_the_same_output_alone_and_in_a_batch(name):
    _, layer = layer_of(name)
    x = torch.randn(7, 192)
    whole = layer(x)
    assert all(torch.equal(layer(x[one : one + 1])[0], whole[one]) for one in range(7))
    assert layer(x[:0]).shape == (0, 24)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_output_has_the_inputs_dtype(dtype):
    _, layer = layer_of("o")
    x = torch.randn(3, 192).to(dtype)
    assert layer(x).dtype == dtype
    assert torch.equal(layer(x), layer(x.double()).to(dtype))


def test_a_cast_model_keeps_its_scales_and_codes():
    _, layer = layer_of("o")
    before = {name: part.clone() for name, part in layer.parts().items()}
    layer.to(torch.bfloat16).float()
    assert all(torch.equal(part, before[name]) for name, part in layer.parts().items())
    assert {"subspace_weight", "subspace_scale"} <= before.keys()


def test_eight_bits_of_activations_are_nearer_than_four():
    errors = []
    for bits in (4, 8):
        dense, layer = layer_of("q", activations=bits)
        x = torch.randn(50, 192)
        exact = nn.functional.linear(x, layer.dequantize(), dense.bias).detach()
        with torch.no_grad():
            errors.append(float((layer(x) - exact).norm()))
    assert errors[1] < errors[0] / 8


@pytest.mark.parametrize("bias", [True, False])
def test_training_through_it_or_around_it_is_an_error_and_no_wrong_gradient(bias):
    _, layer = layer_of("q", bias=bias)
    x = torch.randn(3, 192, requires_grad=True)
    with pytest.raises(RuntimeError, match="rounds its activations has no gradient"):
        (layer(x).sum() + x.sum()).backward()
    assert x.grad is None


def test_its_output_requires_a_gradient_only_where_something_it_depends_on_does():
    _, layer = layer_of("q")
    x = torch.randn(3, 192)
    assert layer(x).requires_grad
    assert not layer.requires_grad_(False)(x).requires_grad
    with torch.no_grad():
        assert not layer(x.requires_grad_()).requires_grad


def test_it_is_exported_without_gradients():
    _, layer = layer_of("o")
    x = torch.randn(4, 192)
    with torch.no_grad():
        exported = torch.export.export(layer, (x,)).module()
        assert torch.equal(exported(x), layer(x))


def test_a_copy_and_a_state_dict_are_the_layer():
    _, layer = layer_of("down")
    x = torch.randn(3, 192)
    again = SVDQIntegerLinear(192, 24, layer.scheme)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    assert "activations=4, subspace=0, hadamard=True" in repr(layer)


def test_autocast_gives_its_dtype():
    _, layer = layer_of("q")
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(3, 192)).dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@every_layer
def test_it_has_shapes_without_data_and_is_one_graph(name):
    _, layer = layer_of(name)
    x = torch.randn(2, 5, 192)
    with torch.no_grad():
        compiled = torch.compile(layer, backend="eager", fullgraph=True)
        assert torch.equal(compiled(x), layer(x))
    assert layer.to("meta")(x.to("meta")).shape == (2, 5, 24)
