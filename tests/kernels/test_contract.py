"""Every op asks the same of its arguments on every path: a part that is elsewhere, or wrong, is named."""

import pytest
import torch

from svdq_hf.format.parts import PARTS, StoredWeight
from svdq_hf.kernels import embedding_op, experts_op, linear_op  # noqa: F401  # define torch.ops.svdq
from svdq_hf.kernels.contract import check_ends
from svdq_hf.nn.linear import SVDQLinear

OPS = torch.ops.svdq
GRIDS = {
    "native": {"group_size": 32, "levels": "normal", "column_scale": True, "scale_bits": 8},
    "reference": {
        "bits": 3,
        "group_size": 32,
        "levels": "normal",
        "column_scale": True,
        "scale_bits": 8,
    },
}
EXPERTS = 3


def stacked(parts):
    return {name: torch.stack([part] * EXPERTS) for name, part in parts.items()}


def calls(parts, in_features, group):
    """For each op its name, its tensors by name in the op's order, and the arguments behind them."""
    out, numbers = parts["weight"].shape[0], (in_features, group)
    whole = StoredWeight.of(parts)._asdict()
    stack = StoredWeight.of(stacked(parts))._asdict()
    x, gradient = torch.randn(4, in_features), torch.randn(4, out)
    ends = torch.tensor([1, 3, 4])
    positions = {name: stack[name] for name in ("salient_rows", "salient_columns")}
    yield "linear", {"x": x, **whole, "bias": torch.randn(out)}, numbers
    yield "input_gradient", {"gradient": gradient, **whole}, numbers
    yield "embedding", {"ids": torch.tensor([0, 1]), **whole}, (*numbers, torch.float32)
    yield "expert_linear", {"x": x, **stack, "ends": ends}, (*numbers, False)
    yield "expert_input_gradient", {"gradient": gradient, **stack, "ends": ends}, (*numbers, False)
    yield "expert_values_gradient", {"x": x, "gradient": gradient, **positions, "ends": ends}, ()


OF_EXPERTS = ("expert_linear", "expert_input_gradient", "expert_values_gradient")
NAMES = ("linear", "input_gradient", "embedding", *OF_EXPERTS)
OF_TOKENS = ("linear", "input_gradient", "expert_linear", "expert_input_gradient")


@pytest.fixture(params=GRIDS)
def grid(request):
    return GRIDS[request.param]


@pytest.fixture(params=NAMES)
def op(request, grid, split):
    _, parts, scheme = split(5, 70, 9, **grid)
    made = {name: (tensors, rest) for name, tensors, rest in calls(parts, 70, scheme.grid.columns(70))}
    return getattr(OPS, request.param).default, *made[request.param]


@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "gradients"])
def test_a_tensor_that_is_elsewhere_is_named(gradients, op):
    call, tensors, rest = op
    for name, tensor in tensors.items():
        others = {**tensors, name: tensor.to("meta")}
        with torch.set_grad_enabled(gradients), pytest.raises(ValueError, match="move one of them") as error:
            call(*others.values(), *rest)
        first = next(iter(tensors))
        assert name == first or name in str(error.value)
        assert "meta" in str(error.value)
        assert "cpu" in str(error.value)


def test_a_tensor_that_is_none_is_named(op):
    call, tensors, rest = op
    for name in tensors.keys() - {"row_scale", "column_scale", "levels", "bias"}:
        with pytest.raises(TypeError, match=r"\w+ is None: it must be a tensor"):
            call(*{**tensors, name: None}.values(), *rest)


def test_scales_have_8_bits_where_rows_have_one_and_only_there(op):
    call, tensors, rest = op
    scale = tensors.get("weight_scale")
    for changes in () if scale is None else ({"weight_scale": scale.float()}, {"row_scale": None}):
        with pytest.raises(ValueError, match=r"weight_scale is .* not what the format stores"):
            call(*{**tensors, **changes}.values(), *rest)


def test_where_all_are_on_meta_it_gives_shapes(op):
    call, tensors, rest = op
    expected = call(*tensors.values(), *rest)
    found = call(*(tensor.to("meta") for tensor in tensors.values()), *rest)
    assert (found.shape, found.dtype, found.device.type) == (expected.shape, expected.dtype, "meta")


def damaged(tensor):
    yield tensor[..., :-1]
    yield tensor.unsqueeze(0)
    yield tensor.to(torch.complex64)


def test_a_tensor_of_another_size_or_dtype_is_refused_with_data_and_without(op):
    call, tensors, rest = op
    inputs = {"x", "gradient", "ids"}
    for name, tensor in tensors.items():
        for bad in damaged(tensor):
            if name in inputs and not bad.is_complex():
                continue  # any shape of tokens; the next test
            if call is OPS.expert_values_gradient.default and bad.shape[-1] == tensor.shape[-1] - 1:
                continue  # of fewer experts, or entries: then the others do not fit
            for device in ("cpu", "meta"):
                others = {key: one.to(device) for key, one in {**tensors, name: bad}.items()}
                with pytest.raises(ValueError, match=r"format stores|floating point|ids are"):
                    call(*others.values(), *rest)


@pytest.mark.parametrize("op", OF_TOKENS, indirect=True)
def test_tokens_of_another_width_are_refused(op):
    call, tensors, rest = op
    first = next(iter(tensors))
    for bad in (tensors[first][:, :-1], torch.tensor(1.0)):
        with pytest.raises(ValueError, match="does not end in the layer's"):
            call(*{**tensors, first: bad}.values(), *rest)


@pytest.mark.parametrize(("in_features", "group"), [(71, 32), (70, 16), (70, 0), (0, 32), (-1, 32)])
def test_numbers_that_do_not_fit_the_parts_are_refused(in_features, group, split):
    _, parts, _ = split(5, 70, 9, **GRIDS["native"])
    x = torch.randn(2, max(in_features, 0))
    with pytest.raises(ValueError, match=r"format stores|must be 1 or more|does not end"):
        OPS.linear(x, *StoredWeight.of(parts), None, in_features, group)


@pytest.mark.parametrize("op", OF_EXPERTS, indirect=True)
@pytest.mark.parametrize("ends", [[2, 1, 4], [-1, 3, 4], [1, 3, 5]], ids=str)
def test_ends_of_experts_that_fall_or_leave_the_tokens_are_refused(ends, op):
    call, tensors, rest = op
    with pytest.raises(ValueError, match="ends must not fall"):
        call(*{**tensors, "ends": torch.tensor(ends)}.values(), *rest)


def test_ends_need_not_reach_the_last_token():
    check_ends([0, 0, 3], 4)
    with pytest.raises(ValueError, match="ends has 5 after 3, of 4 tokens"):
        check_ends([0, 3, 5], 4)


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_on_meta_gives_shapes_as_a_dense_one_does(bias):
    layer = SVDQLinear(70, 5, bias=bias, device="meta")
    with torch.no_grad():
        assert layer(torch.empty(2, 3, 70, device="meta")).shape == (2, 3, 5)
    assert layer(torch.empty(2, 3, 70, device="meta")).is_meta


@pytest.mark.parametrize("name", [*PARTS, "bias"])
def test_a_layer_of_which_a_part_is_on_meta_refuses_on_the_short_way_too(name, split):
    _, parts, scheme = split(5, 70, 9, **GRIDS["native"])
    layer = SVDQLinear(70, 5, scheme)
    layer.load_parts(parts)
    torch.nn.init.zeros_(layer.bias)
    tensor = getattr(layer, name).detach().to("meta")
    setattr(layer, name, torch.nn.Parameter(tensor, False) if name in layer._parameters else tensor)
    with torch.no_grad(), pytest.raises(ValueError, match=f"the {name} on meta; move one of them"):
        layer(torch.randn(2, 70))
