"""The op against an oracle in float64 whose weight is rebuilt from the raw bytes.

Where a tolerance is a bound and not a guess: with u the unit roundoff of a dtype, the weight is
rounded to it (u), products are summed in at least float32 (`in` roundings of u32) and the result is
rounded (u), all relative to `|x| @ |W|.T`.
"""

import numpy as np
import pytest
import torch
from pairwise import pairwise

from svdq_hf.format.parts import PARTS
from svdq_hf.kernels import linear_op as _op  # defines torch.ops.svdq

LINEAR = torch.ops.svdq.linear.default
INPUT_GRADIENT = torch.ops.svdq.input_gradient.default
SHAPES = [(1, 1), (5, 70), (7, 64), (33, 129), (3, 200)]
BATCHES = [(1,), (6,), (2, 3), (0,)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
GRIDS = [
    *({"group_size": size} for size in (8, 64, 128, "row", "tensor")),
    {"group_size": 32, "levels": "normal", "column_scale": True, "scale_bits": 8},
    {"group_size": "row", "levels": "normal"},
    {"group_size": 64, "column_scale": True},
    {"group_size": 8, "scale_bits": 8},
    {"bits": 8},
    {"bits": 8, "group_size": "row"},
    {"bits": 8, "group_size": 32, "column_scale": True, "scale_bits": 8},
    {"bits": 3, "group_size": "tensor"},
    {"bits": 3, "group_size": 8},
    {"bits": 3, "group_size": 32, "levels": "normal", "column_scale": True, "scale_bits": 8},
]


def roundoff(dtype):
    return torch.finfo(dtype).eps / 2


def bound(size, terms, dtype):
    """How far a sum of `terms` products, of which the sizes add up to `size`, may be off in `dtype`."""
    finest = torch.float64 if dtype == torch.float64 else torch.float32
    # 4: weight, result, bias and the sum with it, each rounded to the dtype; 2**-24: a scale times a
    # code in float32. 1e-7 is float16's smallest number, below which there is nothing to be right.
    relative = 4 * roundoff(dtype) + terms * roundoff(finest) + 2.0**-24
    return size * relative + (1e-7 if dtype == torch.float16 else 0)


def assert_within(found, expected, allowed):
    found = found.detach().cpu().double().numpy()
    assert found.shape == expected.shape
    assert (np.abs(found - expected) <= allowed).all(), np.abs(found - expected).max()


def stored(parts):
    return [parts.get(name) for name in PARTS]


def call(x, parts, bias, scheme, in_features):
    return torch.ops.svdq.linear(x, *stored(parts), bias, in_features, scheme.grid.columns(in_features))


def numbers(tensor):
    return tensor.detach().cpu().double().numpy()


def check_forward(x, parts, bias, scheme, dense_by_hand):
    in_features = x.shape[-1]
    dense = dense_by_hand(parts, in_features, scheme.grid.columns(in_features))
    y = call(x, parts, bias, scheme, in_features)
    assert y.dtype == x.dtype
    assert y.device == x.device
    assert y.is_contiguous()
    expected, size = numbers(x) @ dense.T, np.abs(numbers(x)) @ np.abs(dense).T
    if bias is not None:
        expected, size = expected + numbers(bias), size + np.abs(numbers(bias))
    assert_within(y, expected, bound(size, in_features, x.dtype))


@pytest.mark.parametrize(("grid", "shape", "dtype"), pairwise(GRIDS, SHAPES, DTYPES), ids=str)
def test_the_product_is_that_of_the_dense_weight(grid, shape, dtype, split, dense_by_hand, device):
    out, in_features = shape
    _, parts, scheme = split(out, in_features, 9, device=device, **grid)
    x = torch.randn(4, in_features, dtype=dtype, device=device)
    bias = torch.randn(out, dtype=dtype, device=device)
    check_forward(x, parts, bias, scheme, dense_by_hand)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "batch", [(), (0,), (1,), (2, 3), (2, 0, 3), (1, 1, 1), (17,), (130,)], ids=lambda batch: f"batch{batch}"
)
def test_any_batch_shape(batch, dtype, split, dense_by_hand, device):
    _, parts, scheme = split(5, 70, 9, device=device)
    x = torch.randn(*batch, 70, dtype=dtype, device=device)
    check_forward(x, parts, None, scheme, dense_by_hand)
    assert call(x, parts, None, scheme, 70).shape == (*batch, 5)


@pytest.mark.parametrize("k", [0, 1, 350])
def test_no_salient_weights_or_nothing_else(k, split, dense_by_hand, device):
    _, parts, scheme = split(5, 70, k, device=device)
    check_forward(torch.randn(3, 70, device=device), parts, None, scheme, dense_by_hand)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_more_rows_than_a_block(bits, split, dense_by_hand, device):
    _, parts, scheme = split(300, 1100, 500, device=device, bits=bits)
    check_forward(torch.randn(2, 1100, device=device), parts, None, scheme, dense_by_hand)


@pytest.mark.parametrize("layout", ["transposed", "every other", "expanded", "a slice"])
def test_an_input_that_is_not_contiguous(layout, split, dense_by_hand, device):
    _, parts, scheme = split(5, 70, 9, device=device)
    x = {
        "transposed": torch.randn(70, 6, device=device).T,
        "every other": torch.randn(6, 140, device=device)[:, ::2],
        "expanded": torch.randn(70, device=device).expand(3, 2, 70),
        "a slice": torch.randn(4, 8, 90, device=device)[:, 2:5, 7:77],
    }[layout]
    assert not x.is_contiguous()
    check_forward(x, parts, None, scheme, dense_by_hand)


@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_bias_of_another_dtype_than_the_input_is_added(bias_dtype, split, dense_by_hand, device):
    _, parts, scheme = split(5, 70, device=device)
    x = torch.randn(4, 70, dtype=torch.bfloat16, device=device)
    check_forward(x, parts, torch.randn(5, dtype=bias_dtype, device=device), scheme, dense_by_hand)


def test_large_salient_values_survive_in_bfloat16(split, device):
    _, parts, scheme = split(5, 70, 1, device=device)
    parts["salient_values"][0] = 2.0**100
    x = torch.zeros(1, 70, dtype=torch.bfloat16, device=device)
    x[0, int(parts["salient_columns"][0])] = 3.0
    row = int(parts["salient_rows"][0])
    assert float(call(x, parts, None, scheme, 70)[0, row]) == 3 * 2.0**100


def gradients(x, parts, bias, scheme, upstream):
    x = x.clone().requires_grad_()
    bias = bias.clone().requires_grad_()
    values = parts["salient_values"].clone().requires_grad_()
    y = call(x, parts | {"salient_values": values}, bias, scheme, x.shape[-1])
    y.backward(upstream)
    return x.grad, bias.grad, values.grad


@pytest.mark.parametrize(("grid", "dtype", "batch"), pairwise(GRIDS, DTYPES, BATCHES), ids=str)
def test_gradients_are_those_of_the_dense_layer(grid, dtype, batch, split, dense_by_hand, device):
    _, parts, scheme = split(5, 70, 9, device=device, **grid)
    dense = dense_by_hand(parts, 70, scheme.grid.columns(70))
    x = torch.randn(*batch, 70, dtype=dtype, device=device)
    bias = torch.randn(5, dtype=dtype, device=device)
    upstream = torch.randn(*batch, 5, dtype=dtype, device=device)
    for_x, for_bias, for_values = gradients(x, parts, bias, scheme, upstream)
    assert (for_x.dtype, for_bias.dtype, for_values.dtype) == (dtype, dtype, torch.float32)

    # The oracle: torch's own gradients of a dense layer in float64.
    x64, weight64, bias64 = (
        torch.from_numpy(array).requires_grad_() for array in (numbers(x), dense, numbers(bias))
    )
    torch.nn.functional.linear(x64, weight64, bias64).backward(upstream.cpu().double())
    rows, columns = parts["salient_rows"].tolist(), parts["salient_columns"].tolist()

    tokens, flat = np.abs(numbers(x)).reshape(-1, 70), np.abs(numbers(upstream)).reshape(-1, 5)
    assert_within(for_x, numbers(x64.grad), bound(np.abs(numbers(upstream)) @ np.abs(dense), 5, dtype))
    assert_within(for_bias, numbers(bias64.grad), bound(flat.sum(0), len(flat), dtype))
    # Always summed in float32, whatever the dtype of the activations.
    size_of_values = (flat.T @ tokens)[rows, columns]
    assert_within(
        for_values,
        numbers(weight64.grad)[rows, columns],
        bound(size_of_values, len(flat), torch.float32),
    )


def test_gradients_of_more_rows_than_a_block(split, dense_by_hand, device):
    _, parts, scheme = split(300, 1100, 500, device=device)
    x = torch.randn(2, 1100, device=device, requires_grad=True)
    upstream = torch.randn(2, 300, device=device)
    call(x, parts, None, scheme, 1100).backward(upstream)
    dense = dense_by_hand(parts, 1100, 64)
    size = np.abs(numbers(upstream)) @ np.abs(dense)
    assert_within(x.grad, numbers(upstream) @ dense, bound(size, 300, torch.float32))


def test_salient_gradients_in_pieces_are_the_same(split, monkeypatch, device):
    _, parts, scheme = split(5, 70, 100, device=device)
    x, bias = torch.randn(6, 70, device=device), torch.zeros(5, device=device)
    upstream = torch.randn(6, 5, device=device)
    whole = gradients(x, parts, bias, scheme, upstream)[2]
    monkeypatch.setattr(_op, "GATHERED", 6 * 7)  # seven entries at a time
    # Sums of six products of about 1 in float32, in another order.
    torch.testing.assert_close(gradients(x, parts, bias, scheme, upstream)[2], whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("wanted", ["x", "bias", "values"])
def test_a_gradient_is_there_exactly_where_it_is_asked_for(wanted, split, device):
    _, parts, scheme = split(5, 70, 9, device=device)
    leaves = {
        "x": torch.randn(3, 70, device=device),
        "bias": torch.randn(5, device=device),
        "values": parts["salient_values"],
    }
    leaves[wanted].requires_grad_()
    y = call(leaves["x"], parts | {"salient_values": leaves["values"]}, leaves["bias"], scheme, 70)
    y.sum().backward()
    assert [name for name, leaf in leaves.items() if leaf.grad is not None] == [wanted]


def test_gradcheck_of_x_and_bias(split, device):
    _, parts, scheme = split(5, 70, 9, device=device)
    x = torch.randn(2, 70, dtype=torch.float64, device=device, requires_grad=True)
    bias = torch.randn(5, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, bias: call(x, parts, bias, scheme, 70), (x, bias))


@pytest.mark.parametrize("trained", ["x", "x and values"])
def test_backward_keeps_no_dense_weight(trained, split, device):
    out, in_features = 64, 128
    _, parts, scheme = split(out, in_features, 9, device=device)
    parts["salient_values"].requires_grad_("values" in trained)
    x = torch.randn(2, in_features, device=device, requires_grad=True)
    bias = torch.randn(out, device=device, requires_grad=True)
    saved = []

    def note(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y = call(x, parts, bias, scheme, in_features)
    assert saved
    assert max(tensor.nbytes for tensor in saved) == parts["weight"].nbytes  # 4 bits a weight
    assert max(tensor.numel() for tensor in saved if tensor.is_floating_point()) < out * in_features
    kept_x = any(tensor.shape == x.shape for tensor in saved)
    assert kept_x == ("values" in trained)  # the activation is of use for the salient values only
    y.sum().backward()
    assert x.grad.shape == x.shape


def sample(parts, scheme, batch, *, gradients=True, with_bias=True, dtype=torch.float32):
    x = torch.randn(*batch, 70, dtype=dtype, requires_grad=gradients)
    bias = torch.randn(5, dtype=dtype, requires_grad=gradients) if with_bias else None
    values = parts["salient_values"].clone().requires_grad_(gradients)
    return (x, *stored(parts | {"salient_values": values}), bias, 70, scheme.grid.columns(70))


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("gradients", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("batch", [(4,), (2, 3), (0,)], ids=str)
def test_opcheck_of_linear(batch, gradients, with_bias, split):
    _, parts, scheme = split(5, 70, 9)
    checked = torch.library.opcheck(
        LINEAR, sample(parts, scheme, batch, gradients=gradients, with_bias=with_bias)
    )
    assert set(checked.values()) == {"SUCCESS"}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck_of_linear_in_every_dtype(dtype, split):
    _, parts, scheme = split(5, 70, 9)
    checked = torch.library.opcheck(LINEAR, sample(parts, scheme, (4,), dtype=dtype))
    assert set(checked.values()) == {"SUCCESS"}


@pytest.mark.parametrize("bits", [3, 8])
def test_opcheck_of_other_bits(bits, split):
    _, parts, scheme = split(5, 70, 9, bits=bits)
    for op, inputs in (
        (LINEAR, sample(parts, scheme, (4,))),
        (INPUT_GRADIENT, (torch.randn(4, 5), *stored(parts), 70, 64)),
    ):
        assert set(torch.library.opcheck(op, inputs).values()) == {"SUCCESS"}


@pytest.mark.parametrize("batch", [(), (4,), (2, 3), (0,)], ids=str)
def test_opcheck_of_input_gradient(batch, split):
    _, parts, _ = split(5, 70, 9)
    checked = torch.library.opcheck(INPUT_GRADIENT, (torch.randn(*batch, 5), *stored(parts), 70, 64))
    assert set(checked.values()) == {"SUCCESS"}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shapes_without_data_are_those_with_data(dtype, split):
    _, parts, scheme = split(5, 70, 9)
    arguments = [
        argument.to("meta") if isinstance(argument, torch.Tensor) else argument
        for argument in sample(parts, scheme, (2, 3), dtype=dtype)
    ]
    y = LINEAR(*arguments)
    assert (y.device.type, tuple(y.shape), y.dtype) == ("meta", (2, 3, 5), dtype)


@pytest.mark.parametrize("batch", [(), (4,), (2, 3)], ids=str)
@pytest.mark.parametrize("last", [69, 71, 128])
def test_an_input_of_the_wrong_width_is_refused(last, batch, split, device):
    _, parts, scheme = split(5, 70, device=device)
    with pytest.raises(ValueError, match=rf"\[.*{last}\] does not end in the layer's 70 features"):
        call(torch.randn(*batch, last, device=device), parts, None, scheme, 70)


def test_an_input_without_a_dimension_is_refused(split, device):
    _, parts, scheme = split(5, 70, device=device)
    with pytest.raises(ValueError, match=r"input \[\] does not end in the layer's 70 features"):
        call(torch.tensor(1.0, device=device), parts, None, scheme, 70)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool], ids=str)
def test_an_input_of_integers_is_refused(dtype, split, device):
    _, parts, scheme = split(5, 70, device=device)
    with pytest.raises(ValueError, match=f"input is {dtype}; the layer computes in floating point"):
        call(torch.ones(2, 70, dtype=dtype, device=device), parts, None, scheme, 70)


def test_an_input_on_another_device_is_refused(split):
    _, parts, scheme = split(5, 70)
    with pytest.raises(ValueError, match="input is on meta and the weight on cpu; move one of them"):
        call(torch.ones(2, 70, device="meta"), parts, None, scheme, 70)
