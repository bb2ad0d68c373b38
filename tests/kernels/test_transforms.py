"""Quantized layers inside torch.func's transforms and torch.fx's traces."""

import pytest
import tiny_experts
import torch
from torch import nn
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vmap

from svdq_hf import SVDQConfig, quantize_model
from svdq_hf.nn.embedding import SVDQEmbedding
from svdq_hf.nn.experts import SVDQExperts
from svdq_hf.nn.inventory import svdq_experts
from svdq_hf.nn.linear import SVDQLinear

GRIDS = [
    {"group_size": 32, "levels": "normal", "column_scale": True, "scale_bits": 8},
    {"bits": 3, "group_size": 16},
    {"bits": 8, "group_size": "row"},
]


@pytest.fixture(params=GRIDS, ids=str)
def layer(request, split):
    _, parts, scheme = split(5, 70, 9, **request.param)
    made = SVDQLinear(70, 5, scheme)
    made.load_parts(parts)
    nn.init.normal_(made.bias)
    return made


def trained(layer):
    return {name: p.detach() for name, p in layer.named_parameters() if p.requires_grad}


def loss(layer, parameters, x):
    return functional_call(layer, parameters, (x,)).square().sum()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own jvp
def test_transforms_of_the_input_are_those_of_the_dense_layer(layer):
    x, weight = torch.randn(3, 70), layer.dequantize()
    torch.testing.assert_close(grad(lambda one: layer(one).sum())(x), weight.sum(0).expand(3, 70))
    for jacobian in (jacrev, jacfwd):
        torch.testing.assert_close(jacobian(layer)(x[0]), weight)
    torch.testing.assert_close(vmap(layer)(x), layer(x))
    torch.testing.assert_close(jvp(layer, (x,), (x,))[1], x @ weight.T)


def test_gradients_of_each_sample_are_those_of_backward(layer):
    x = torch.randn(4, 70)
    found = vmap(grad(lambda p, one: loss(layer, p, one)), in_dims=(None, 0))(trained(layer), x)
    assert found.keys() == {"salient_values", "bias"}
    for at, one in enumerate(x):
        layer.zero_grad()
        layer(one).square().sum().backward()
        for name, gradient in found.items():
            torch.testing.assert_close(gradient[at], layer.get_parameter(name).grad)


def test_without_gradients_and_in_half_precision_it_is_the_dense_product(layer):
    x = torch.randn(3, 70).bfloat16()
    with torch.no_grad():
        expected = x @ layer.dequantize().bfloat16().T + layer.bias.bfloat16()
        found = vmap(layer)(x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=2**-6, atol=2**-5)


def test_packed_tensors_cannot_be_mapped_over(layer):
    tensors = {name: torch.stack([one.detach()] * 2) for name, one in layer.state_dict().items()}
    with pytest.raises(ValueError, match=r"weight of a quantized layer is frozen.*p\.requires_grad"):
        vmap(lambda given, x: functional_call(layer, given, (x,)), in_dims=(0, None))(
            tensors, torch.randn(70)
        )


def test_a_wrong_position_is_refused_there_too(layer):
    layer.salient_columns[2] = 130
    with pytest.raises(ValueError, match="salient_columns has 130"):
        vmap(layer)(torch.randn(3, 70))


class Network(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.inner = nn.Sequential(layer, nn.ReLU(), nn.Linear(5, 2))

    def forward(self, x):
        return self.inner(x * 2)


def test_a_model_is_traced_with_the_layer_as_one_node(layer):
    model, x = Network(layer), torch.randn(3, 70)
    traced = torch.fx.symbolic_trace(model)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == [
        "inner.0",
        "inner.1",
        "inner.2",
    ]
    assert torch.equal(traced(x), model(x))
    with torch.no_grad():
        assert torch.equal(traced(x), model(x))
    traced(x).sum().backward()
    assert layer.salient_values.grad is not None


def packed_experts():
    model = quantize_model(tiny_experts.build("mixtral"), SVDQConfig(k=8, group_size=32))
    return next(svdq_experts(model))[1]


def test_experts_refuse_transforms_and_name_the_remedy():
    experts = packed_experts()
    chosen, weights = torch.tensor([[2, 1]] * 3), torch.rand(3, 2)
    with pytest.raises(ValueError, match=r"MixtralExperts.*loss\.backward.*dequantize_model"):
        grad(lambda x: experts(x, chosen, weights).sum())(torch.randn(3, 64))


class Routed(nn.Module):
    def __init__(self, experts):
        super().__init__()
        self.experts = experts

    def forward(self, x, chosen, weights):
        return self.experts(x, chosen, weights) + 1


def test_experts_are_one_node_of_a_trace():
    model = Routed(packed_experts())
    inputs = torch.randn(3, 64), torch.tensor([[2, 1]] * 3), torch.rand(3, 2)
    traced = torch.fx.symbolic_trace(model)
    assert isinstance(traced.experts, SVDQExperts)
    assert torch.equal(traced(*inputs), model(*inputs))


def test_an_embedding_is_one_node_of_a_trace(split):
    _, parts, scheme = split(40, 64, 9, group_size=32)
    packed = SVDQEmbedding(nn.Embedding(40, 64), scheme)
    for name, part in parts.items():
        setattr(packed, name, nn.Parameter(part, False) if name == "weight" else part)
    ids, dense = torch.tensor([[1, 2], [3, 1]]), packed.dequantize()
    model = nn.Sequential(packed, nn.Flatten())
    traced = torch.fx.symbolic_trace(model)
    assert torch.equal(traced(ids), dense[ids].flatten(1))
    assert torch.equal(vmap(packed)(ids), dense[ids])
