import copy
import pickle

import pytest
import torch
import transformers
from torch import nn

from svdq_hf import SVDQConfig, quantize_model
from svdq_hf.core.grid import Grid
from svdq_hf.format.decode import reconstruct
from svdq_hf.format.parts import PARTS, Scheme, part_specs
from svdq_hf.nn.linear import SVDQLinear

CASTS = {
    "bfloat16()": lambda layer: layer.bfloat16(),
    "half()": lambda layer: layer.half(),
    "float()": lambda layer: layer.float(),
    "double()": lambda layer: layer.double(),
    "to(dtype)": lambda layer: layer.to(torch.float16),
    "to(dtype=, device=)": lambda layer: layer.to(device="cpu", dtype=torch.bfloat16),
    "to(tensor)": lambda layer: layer.to(torch.empty(0, dtype=torch.float64)),
}


@pytest.fixture
def make_layer(split):
    """A layer `[out, in]` filled with the parts of a random weight."""

    def make(out=5, in_features=70, k=6, *, device="cpu", dtype=None, bias=True, compute_dtype=None, **grid):
        _, parts, scheme = split(out, in_features, k, device=device, **grid)
        layer = SVDQLinear(
            in_features, out, scheme, bias=bias, dtype=dtype, device=device, compute_dtype=compute_dtype
        )
        layer.load_parts(parts)
        if bias:
            torch.nn.init.normal_(layer.bias)
        return layer

    return make


def stored(layer):
    """All tensors of the layer but the bias, as copies."""
    return {name: part.clone() for name, part in layer.parts().items()}


def assert_same_parts(layer, parts):
    for name, part in layer.parts().items():
        assert part.dtype == parts[name].dtype, name
        assert torch.equal(part.cpu(), parts[name].cpu()), name


@pytest.mark.parametrize("size", [8, 64, "row", "tensor"])
@pytest.mark.parametrize("cast", CASTS)
def test_a_cast_changes_the_bias_and_nothing_stored(cast, size, make_layer):
    layer = make_layer(group_size=size)
    before, plain = stored(layer), torch.nn.Linear(1, 1)
    assert CASTS[cast](layer) is layer
    CASTS[cast](plain)
    assert_same_parts(layer, before)
    assert layer.bias.dtype == plain.bias.dtype


def test_a_cast_there_and_back_loses_no_bit(make_layer):
    layer = make_layer(group_size="row")  # float32 scales: bfloat16 would lose 16 of 24 bits
    before = stored(layer)
    assert_same_parts(layer.half().bfloat16().float(), before)


@pytest.mark.parametrize("cast", CASTS)
def test_a_cast_of_a_model_around_the_layer_does_the_same(cast, make_layer):
    model = torch.nn.Sequential(torch.nn.Linear(70, 70), make_layer())
    before, plain = stored(model[1]), torch.nn.Linear(1, 1)
    CASTS[cast](model)
    CASTS[cast](plain)
    assert_same_parts(model[1], before)
    assert model[0].weight.dtype == plain.weight.dtype
    x = torch.randn(3, 70, dtype=plain.weight.dtype)
    assert model(x).dtype == x.dtype


@pytest.mark.parametrize("cast", CASTS)
def test_a_cast_with_gradients_present_keeps_them_usable(cast, make_layer):
    layer = make_layer()
    layer(torch.randn(3, 70)).sum().backward()
    before, gradient = stored(layer), layer.salient_values.grad.clone()
    CASTS[cast](layer)
    assert_same_parts(layer, before)
    assert torch.equal(layer.salient_values.grad, gradient)
    assert layer.salient_values.grad.dtype == torch.float32
    assert layer.bias.grad.dtype == layer.bias.dtype
    torch.optim.SGD(layer.parameters(), lr=0.5).step()
    assert torch.equal(layer.salient_values, before["salient_values"] - 0.5 * gradient)


def test_a_cast_keeps_parameters_the_same_objects(make_layer):
    layer = make_layer()
    before = dict(layer.named_parameters())
    layer.half()
    after = dict(layer.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)  # an optimizer goes on seeing them


def test_what_is_trained_and_what_is_frozen(make_layer):
    layer = make_layer()
    assert {name: parameter.requires_grad for name, parameter in layer.named_parameters()} == {
        "weight": False,
        "salient_values": True,
        "bias": True,
    }
    assert [name for name, _ in layer.named_buffers()] == ["weight_scale", "salient_rows", "salient_columns"]


def test_a_step_of_training_changes_the_salient_weights_only(make_layer):
    layer = make_layer()
    before = stored(layer)
    layer(torch.randn(3, 70)).square().sum().backward()
    torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0).step()
    after = stored(layer)
    assert (after["salient_values"] != before["salient_values"]).all()
    for name in before.keys() - {"salient_values"}:
        assert torch.equal(after[name], before[name]), name
    changed = layer.dequantize() != reconstruct(before, 70, layer.scheme)
    expected = torch.zeros(5, 70, dtype=torch.bool)
    expected[before["salient_rows"].long(), before["salient_columns"].long()] = True
    assert torch.equal(changed, expected)


def test_an_empty_layer_has_the_shapes_of_part_specs_on_the_meta_device():
    scheme = Scheme(0.1, Grid("row"))
    layer = SVDQLinear(70, 5, scheme, device="meta", dtype=torch.bfloat16)
    specs = part_specs(5, 70, scheme)
    assert {name: (tuple(part.shape), part.dtype) for name, part in layer.parts().items()} == specs
    assert {tensor.device.type for tensor in layer.state_dict().values()} == {"meta"}
    assert layer.bias.dtype == torch.bfloat16


def test_from_the_meta_device_to_empty_and_loaded_it_computes_the_same(make_layer, device):
    source = make_layer(device=device)
    layer = SVDQLinear(70, 5, source.scheme, device="meta").half().to_empty(device=device)
    for name, part in layer.parts().items():
        assert part.dtype == source.parts()[name].dtype, name
    layer.float().load_state_dict(source.state_dict(), strict=True)
    x = torch.randn(3, 70, device=device)
    assert torch.equal(layer(x), source(x))


def test_a_state_dict_on_the_meta_device_is_filled_by_assign(make_layer):
    source = make_layer()
    layer = SVDQLinear(70, 5, source.scheme, device="meta")
    layer.load_state_dict(source.state_dict(), strict=True, assign=True)
    assert_same_parts(layer, source.parts())
    assert layer.salient_values.requires_grad
    assert not layer.weight.requires_grad


@pytest.mark.parametrize("bias", [True, False])
def test_the_state_dict_is_the_stored_format(bias, make_layer):
    names = {"weight", "weight_scale", "salient_values", "salient_rows", "salient_columns"}
    assert set(make_layer(bias=bias).state_dict()) == names | ({"bias"} if bias else set())


def test_a_missing_part_in_a_state_dict_is_an_error(make_layer):
    source = make_layer()
    for name in source.state_dict():
        state = {key: tensor for key, tensor in source.state_dict().items() if key != name}
        with pytest.raises(RuntimeError, match=f'Missing key.*"{name}"'):
            SVDQLinear(70, 5, source.scheme).load_state_dict(state, strict=True)


def test_a_dense_weight_in_a_state_dict_is_an_error(make_layer):
    state = make_layer().state_dict() | {"weight": torch.randn(5, 70)}
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        make_layer().load_state_dict(state)


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_computes_the_same_and_is_independent(way, make_layer):
    layer = make_layer()
    layer.facts = {"relative_error": 0.1}
    twin = copy.deepcopy(layer) if way == "deepcopy" else pickle.loads(pickle.dumps(layer))
    x = torch.randn(3, 70)
    expected = layer(x)
    assert torch.equal(twin(x), expected)
    assert twin.scheme == layer.scheme
    assert twin.facts == layer.facts
    with torch.no_grad():
        twin.salient_values.zero_()
    assert torch.equal(layer(x), expected)
    before = stored(layer)
    assert_same_parts(layer.half(), before)
    assert twin.half().salient_values.dtype == torch.float32  # the guard is copied too


@pytest.mark.parametrize("bias", [True, False])
def test_forward_is_the_dense_layer_of_dequantize(bias, make_layer, device):
    layer = make_layer(bias=bias, device=device)
    x = torch.randn(2, 3, 70, device=device)
    expected = torch.nn.functional.linear(x.double(), layer.dequantize().double(), None)
    expected = expected + layer.bias.double() if bias else expected
    # 70 products of sizes about 1 in float32.
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)


def test_dequantize_is_reconstruct_and_off_the_graph(make_layer):
    layer = make_layer()
    dense = layer.dequantize()
    assert torch.equal(dense, reconstruct(layer.parts(), 70, layer.scheme))
    assert not dense.requires_grad


def test_compute_dtype_is_of_the_product_and_the_output_follows_the_input(make_layer):
    layer = make_layer(compute_dtype=torch.bfloat16)
    plain = make_layer()
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(3, 70)
    y = layer(x)
    assert y.dtype == torch.float32
    assert torch.equal(y, plain(x.bfloat16()).float())
    assert not torch.equal(y, plain(x))
    half = x.half()
    assert layer(half).dtype == torch.float16
    assert torch.equal(layer(half), plain(half.bfloat16()).half())


def test_gradients_flow_through_compute_dtype(make_layer):
    layer = make_layer(compute_dtype=torch.bfloat16)
    x = torch.randn(3, 70, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.dtype == torch.float32
    expected = layer.dequantize().bfloat16().float().sum(0).expand(3, 70)
    # Five weights of about 1 summed, and rounded to bfloat16 (2**-8).
    torch.testing.assert_close(x.grad, expected, rtol=2.0**-8, atol=2.0**-7)


def test_load_parts_takes_the_tensors_over(make_layer, split):
    _, parts, scheme = split(5, 70, 6)
    layer = SVDQLinear(70, 5, scheme, device="meta")
    layer.load_parts(parts)
    for name, part in layer.parts().items():
        assert part.data_ptr() == parts[name].data_ptr(), name
    assert isinstance(layer.weight, torch.nn.Parameter)
    assert not layer.weight.requires_grad
    assert isinstance(layer.salient_values, torch.nn.Parameter)
    assert layer.salient_values.requires_grad
    assert {"weight_scale", "salient_rows", "salient_columns"} == set(dict(layer.named_buffers()))


def test_the_defaults_are_those_of_the_scheme():
    layer = SVDQLinear(70, 5)
    assert layer.scheme == Scheme()
    assert layer.group == 64
    assert layer.salient_values.shape == (256,)
    assert SVDQLinear(70, 5, Scheme(grid=Grid("row"))).group == 70


@pytest.mark.parametrize(
    ("layer", "text"),
    [
        (
            lambda: SVDQLinear(70, 5, Scheme(6)),
            "SVDQLinear(in_features=70, out_features=5, bias=True, k=6, group_size=64)",
        ),
        (
            lambda: SVDQLinear(70, 5, Scheme(0.1, Grid("row")), bias=False, device="meta", transposed=True),
            "SVDQLinear(in_features=70, out_features=5, bias=False, k=35, group_size=row, transposed=True)",
        ),
        (
            lambda: SVDQLinear(70, 5, Scheme(6, Grid(bits=8))),
            "SVDQLinear(in_features=70, out_features=5, bias=True, k=6, group_size=64, bits=8)",
        ),
    ],
    ids=["plain", "transposed", "8 bits"],
)
def test_repr(layer, text):
    assert repr(layer()) == text


@pytest.fixture
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def all_gradients(layer, x):
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, layer.bias.grad.clone(), layer.salient_values.grad.clone()]


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_it_computes_and_learns_the_same(dtype, make_layer, device):
    layer = make_layer(device=device, dtype=dtype)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for batch in ((4,), (7,), (2, 3)):
        x = torch.randn(*batch, 70, dtype=dtype, device=device)
        for found, expected in zip(all_gradients(compiled, x), all_gradients(layer, x), strict=True):
            assert torch.equal(found, expected)  # the same kernels in the same order


@pytest.mark.usefixtures("_fresh_compiler")
def test_exported_it_computes_the_same_for_any_batch(make_layer):
    layer = make_layer().eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(layer, (torch.randn(4, 70),), dynamic_shapes=({0: batch},))
    targets = {node.target for node in program.graph.nodes if node.op == "call_function"}
    assert torch.ops.svdq.linear.default in targets
    for tokens in (1, 4, 9):
        x = torch.randn(tokens, 70)
        assert torch.equal(program.module()(x), layer(x))


@pytest.mark.parametrize("what", ["bias", "salient_values"])
def test_one_input_without_batch_has_gradients(split, what):
    _, parts, scheme = split(5, 70, 3)
    layer = SVDQLinear(70, 5, scheme)
    layer.load_parts(parts)
    torch.nn.init.zeros_(layer.bias)
    x = torch.randn(70)
    layer(x).sum().backward()
    expected = {"bias": torch.ones(5), "salient_values": x[parts["salient_columns"].long()]}
    assert torch.equal(getattr(layer, what).grad, expected[what])


def test_gradient_of_a_gradient_is_that_of_the_dense_layer(split):
    _, parts, scheme = split(5, 70, 3)
    layer = SVDQLinear(70, 5, scheme, bias=False)
    layer.load_parts(parts)
    x = torch.randn(4, 70, requires_grad=True)
    first = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)[0]
    found = torch.autograd.grad(first.square().sum(), [x, layer.salient_values])
    dense = layer.dequantize().requires_grad_()
    expected = torch.autograd.grad((2 * x @ dense.T @ dense).square().sum(), [x, dense])
    at = parts["salient_rows"].long(), parts["salient_columns"].long()
    # float32 sums of 70 products, squared twice
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(found[1], expected[1][at], rtol=1e-4, atol=1e-2)


def test_a_replica_of_data_parallel_computes_the_same():
    """nn.DataParallel's replicas keep their tensors as plain attributes."""
    model = nn.Sequential(nn.Linear(64, 32))
    quantize_model(model, SVDQConfig(k=8, saliency="magnitude"))
    layer, x = model[0], torch.randn(2, 64)
    replica = layer._replicate_for_data_parallel()
    for name in (*PARTS, "bias"):
        setattr(replica, name, getattr(layer, name))
    assert torch.equal(replica(x), layer(x))


def test_a_part_that_is_elsewhere_is_an_error_and_not_memory_as_it_is():
    model = nn.Sequential(nn.Linear(64, 32))
    quantize_model(model, SVDQConfig(k=8, saliency="magnitude"))
    model[0].salient_values = nn.Parameter(model[0].salient_values.to("meta"))
    with pytest.raises(ValueError, match="the salient_values on meta"), torch.no_grad():
        model(torch.randn(2, 64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_first_parameter_says_the_dtype(dtype):
    layer = SVDQLinear(64, 8, dtype=dtype)
    assert next(layer.parameters()).dtype == dtype
    assert next(SVDQLinear(64, 8, bias=False).parameters()).is_floating_point()
    assert next(SVDQLinear(64, 8, SVDQConfig(k=0).scheme, bias=False).parameters()).is_floating_point()


def test_a_family_that_asks_its_first_parameter_for_a_dtype_keeps_its_table(tmp_path):
    sizes = {"image_size": 32, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}
    dense = transformers.Swinv2Model(transformers.Swinv2Config(**sizes))
    dense.save_pretrained(tmp_path)
    model = transformers.Swinv2Model.from_pretrained(tmp_path, quantization_config=SVDQConfig(k=4))
    table = "encoder.layers.0.blocks.0.attention.self.relative_coords_table"
    assert torch.equal(model.get_buffer(table), dense.get_buffer(table))
