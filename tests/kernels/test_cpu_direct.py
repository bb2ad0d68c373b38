"""The short way into the native library: the same bits as the op, and only where nobody could tell."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from svdq_hf.format.parts import PARTS, StoredWeight
from svdq_hf.kernels import cpu
from svdq_hf.kernels import cpu_direct as direct
from svdq_hf.kernels import linear_op as op
from svdq_hf.kernels.native import library as native
from svdq_hf.nn.linear import SVDQLinear

pytestmark = pytest.mark.skipif(
    native.direct_call() is None, reason="no native library, or no C interface of DLPack"
)
GRIDS = [
    {"group_size": 32, "levels": "normal", "column_scale": True, "scale_bits": 8},
    {"group_size": 64},
    {"group_size": "row"},
    {"group_size": "tensor", "scale": "absmax"},
    {"group_size": 32, "levels": "normal", "scale_bits": 8, "bits": 3},
    {"group_size": 64, "bits": 8},
]


@pytest.fixture
def layer(split):
    _, parts, scheme = split(33, 129, 9, **GRIDS[0])
    made = SVDQLinear(129, 33, scheme)
    made.load_parts(parts)
    nn.init.normal_(made.bias)
    return made


def inputs_of(parts, bias):
    return StoredWeight.of(parts), bias


def short(layer, x):
    """What the short way gives; None where it gives the call to the op."""
    with torch.no_grad():
        return direct.linear(x, *layer.stored_and_bias(), layer.in_features, layer.group, layer.fast)


def by_the_op(layer, x):
    stored, bias = layer.stored_and_bias()
    return op.linear(x, *stored, bias, layer.in_features, layer.group)


@pytest.mark.parametrize("bias", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("fast", [False, True])
def test_it_gives_the_bits_of_the_op(fast, dtype, grid, bias, split):
    _, parts, scheme = split(33, 129, 9, **grid)
    given = inputs_of(parts, None if bias is None else torch.randn(33).to(bias))
    group = scheme.grid.columns(129)
    for batch in ((), (0,), (1,), (2, 3), (1, 1, 1), (12,), (16,)):
        x = torch.randn(*batch, 129).to(dtype)
        with torch.no_grad():
            found = direct.linear(x, *given, 129, group, fast)
            expected = op.linear(x, *given[0], given[1], 129, group, fast)
        assert found is not None
        assert (found.shape, found.dtype) == (expected.shape, dtype)
        assert torch.equal(found, expected)


def test_a_layer_takes_it_in_plain_inference_and_asks_the_op_for_all_else(layer, monkeypatch):
    x, asked = torch.randn(3, 129), []
    expected = layer(x)
    monkeypatch.setattr("svdq_hf.nn.linear.linear", lambda *_: asked.append(1) or expected)
    with torch.no_grad():
        assert torch.equal(layer(x), expected)
    with torch.inference_mode():
        assert torch.equal(layer(x), expected)
    assert not asked
    layer(x)
    assert asked == [1]


class Functions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen = [*getattr(self, "seen", []), str(func)]
        return func(*args, **(kwargs or {}))


def test_where_someone_watches_or_changes_operations_it_is_not_taken(layer):
    x = torch.randn(3, 129)
    assert short(layer, x) is not None
    assert direct.linear(x, *layer.stored_and_bias(), 129, layer.group) is None  # gradients
    for watching in (
        torch.autocast("cpu", torch.bfloat16),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]),
        Functions(),
        Operations(),
    ):
        with watching:
            assert short(layer, x) is None
    with Operations() as seen, torch.no_grad():
        layer(x)
    assert "svdq.linear.default" in seen.seen


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
def test_under_vmap_and_in_a_trace_it_is_not_taken(layer):
    x, met = torch.randn(3, 129), []

    def call(one):
        met.append(short(layer, one) is None)
        return one

    torch.func.vmap(call)(x)
    torch.jit.trace(call, x[0], check_trace=False)
    assert met == [True, True]


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(129, 4).T,
        torch.randn(2, 129, dtype=torch.float64),
        torch.randn(2, 128),
        torch.ones(2, 129, dtype=torch.int64),
        torch.ones(2, 129, device="meta"),
        torch.tensor(1.0),
        nn.Parameter(torch.randn(2, 129)),
        torch._neg_view(torch.randn(2, 129)),
    ],
    ids=["strided", "float64", "narrow", "integers", "meta", "no dimension", "a subclass", "negated"],
)
def test_an_input_that_it_does_not_read_is_left_to_the_op(x, layer):
    assert short(layer, x) is None


@pytest.mark.parametrize("amx", [False, True], ids=["no AMX", "AMX"])
@pytest.mark.parametrize("tokens", [16, 17])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_meets_dense_rows_is_left_to_the_op(dtype, tokens, amx, layer, monkeypatch):
    monkeypatch.setattr(cpu, "has_amx", lambda: amx)
    decoded = cpu.way(tokens, dtype, cpu.chosen_path(False, 129), amx) == cpu.DECODED
    assert (short(layer, torch.randn(tokens, 129).to(dtype)) is not None) == decoded


def damaged(part):
    yield part[:-1]
    yield part.double()
    yield part.repeat_interleave(2, -1)[..., ::2]
    yield part.to("meta")
    yield part.as_subclass(type("Own", (torch.Tensor,), {}))


@pytest.mark.parametrize("name", [*PARTS, "bias"])
def test_a_part_that_is_wrong_is_never_followed(name, layer):
    """Each call looks at every tensor, so it does not matter what was there in the call before."""
    stored, bias = layer.stored_and_bias()
    x, given = torch.randn(2, 129), {**stored.as_dict(), "bias": bias}
    assert short(layer, x) is not None
    for bad in damaged(given[name].detach()):
        if name == "bias" and bad.dtype == torch.float64:
            continue  # it is cast, as a narrow one is
        with torch.no_grad():
            wrong = {**given, name: bad}
            bias = wrong.pop("bias")
            assert direct.linear(x, StoredWeight.of(wrong), bias, 129, layer.group) is None


@pytest.mark.parametrize("grid", [{"group_size": 8}, {"group_size": 16}], ids=str)
def test_what_the_library_does_not_decode_is_left_to_the_op(grid, split):
    _, parts, scheme = split(33, 128, 9, **grid)
    group, x = scheme.grid.columns(128), torch.randn(2, 128)
    with torch.no_grad():
        assert direct.linear(x, *inputs_of(parts, None), 128, group) is None


def test_storage_that_is_swapped_under_a_parameter_is_noticed(layer):
    x = torch.randn(2, 129)
    with torch.no_grad():
        before = layer(x)
        layer.salient_values.data = layer.salient_values.data * 2
        doubled = layer(x)
        assert torch.equal(doubled, by_the_op(layer, x))
        assert not torch.equal(doubled, before)
        layer.salient_values.mul_(0.5)  # as an optimizer does
        assert torch.equal(layer(x), before)
        layer.weight.data = layer.weight.data[:-1].clone()
        with pytest.raises(ValueError, match="not what the format stores"):
            layer(x)
        layer.weight.untyped_storage().resize_(0)
        assert short(layer, x) is None


def test_a_state_dict_that_is_loaded_in_place_or_assigned_is_what_is_computed(layer, split):
    _, parts, scheme = split(33, 129, 9, **GRIDS[0])
    other, x = SVDQLinear(129, 33, scheme), torch.randn(2, 129)
    other.load_parts({name: part.flip(0) if name == "weight" else part for name, part in parts.items()})
    nn.init.normal_(other.bias)
    with torch.no_grad():
        layer(x)
        for assign in (False, True):
            twin = copy.deepcopy(layer)
            twin(x)
            twin.load_state_dict(other.state_dict(), assign=assign)
            assert torch.equal(twin(x), other(x))


def test_a_position_that_does_not_exist_is_an_error(layer):
    with torch.no_grad():
        layer.salient_columns[2] = 129
        with pytest.raises(ValueError, match="position is out of range"):
            layer(torch.randn(1, 129))


def test_copies_and_pickles_compute_the_same_after_a_call(layer):
    x = torch.randn(2, 129)
    with torch.no_grad():
        expected = layer(x)
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert torch.equal(twin(x), expected)


def test_a_torch_without_dlpacks_interface_asks_the_op(layer, monkeypatch):
    monkeypatch.setattr(native, "direct_call", lambda: None)
    x = torch.randn(2, 129)
    assert short(layer, x) is None
    with torch.no_grad():
        assert torch.equal(layer(x), by_the_op(layer, x))
