"""`compute="fast"`: activations of 16 bits, where tokens are few and the processor sums bytes."""

import json

import pytest
import tiny_models as tiny
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from svdq_hf import SVDQConfig, quantize_model, set_compute
from svdq_hf.format.decode import reconstruct
from svdq_hf.format.parts import StoredWeight
from svdq_hf.kernels import cpu
from svdq_hf.kernels.native import library as native
from svdq_hf.nn.inventory import svdq_layers
from svdq_hf.nn.linear import SVDQLinear

FAST = native.fast_path()
fast_only = pytest.mark.skipif(native.best_path() == FAST, reason="the processor has no byte products")
needs_library = pytest.mark.skipif(native.library() is None, reason="no native library")
GRIDS = [
    {"group_size": 32, "levels": "normal", "column_scale": True, "scale_bits": 8},
    {"group_size": 64, "column_scale": True},
    {"group_size": "row", "levels": "normal"},
    {"group_size": "tensor", "scale": "absmax"},
]


def stored(parts):
    return StoredWeight.of(parts)


def fast_linear(x, parts, in_features, group):
    """The fast path, also of rows so short that it would not be taken."""
    return cpu.linear_on(FAST, x, stored(parts), None, in_features, group)


@pytest.mark.parametrize(("fast", "columns"), [(True, 768), (True, 767), (False, 4096)])
def test_the_fast_path_is_taken_where_it_is_asked_for_and_rows_are_long(fast, columns, monkeypatch):
    monkeypatch.setattr(cpu, "fast_path", lambda: "fast")
    monkeypatch.setattr(cpu, "best_path", lambda: "exact")
    assert cpu.chosen_path(fast, columns) == ("fast" if fast and columns >= 768 else "exact")


def with_outliers(tokens, in_features):
    x = torch.randn(tokens, in_features)
    x[:, ::97] *= 20
    return x


@needs_library
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize(("out", "in_features"), [(33, 129), (100, 200), (64, 1100), (33, 4096)])
def test_the_relative_error_against_float64_is_below_one_in_ten_thousand(out, in_features, grid, split):
    _, parts, scheme = split(out, in_features, 9, **grid)
    weight = reconstruct(parts, in_features, scheme).double()
    for tokens in (1, 2, 3, 4, 5, 12, 13):
        x = with_outliers(tokens, in_features)
        y = fast_linear(x, parts, in_features, scheme.grid.columns(in_features))
        right = x.double() @ weight.T
        assert (y - right).norm() <= 1e-4 * right.norm(), tokens


@fast_only
def test_it_rounds_few_tokens_and_no_others(split):
    _, parts, scheme = split(33, 200, 9, **GRIDS[0])
    x, group = torch.randn(13, 200), scheme.grid.columns(200)
    for tokens in (1, 4, 5, 13):
        exact = cpu.linear(x[:tokens], stored(parts), None, 200, group)
        fast = fast_linear(x[:tokens], parts, 200, group)
        assert torch.equal(exact, fast) == (tokens > 4)


@fast_only
def test_salient_weights_are_multiplied_exactly(split):
    _, parts, scheme = split(5, 70, 1, **GRIDS[0])
    row, column = int(parts["salient_rows"][0]), int(parts["salient_columns"][0])
    parts["salient_values"][0] = 2.0**30
    x = torch.zeros(1, 70)
    x[0, column] = 1 + 2.0**-20  # more bits than sixteen
    y = fast_linear(x, parts, 70, scheme.grid.columns(70))
    assert float(y[0, row]) == float(2.0**30 * x[0, column])


@fast_only
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_does_not_become_a_number(value, split):
    _, parts, scheme = split(5, 200, 4, **GRIDS[0])
    x = torch.randn(2, 200)
    x[1, 77] = value
    y = fast_linear(x, parts, 200, scheme.grid.columns(200))
    assert y[0].isfinite().all()
    assert not y[1].isfinite().any()


@fast_only
@pytest.mark.parametrize("size", [0.0, 1e-38, 1e-30, 1e30])
def test_activations_of_any_size(size, split):
    _, parts, scheme = split(5, 200, 4, **GRIDS[0])
    x = torch.randn(2, 200)
    y, scaled = (fast_linear(each, parts, 200, scheme.grid.columns(200)) for each in (x, x * size))
    assert (scaled.double() - y.double() * size).norm() <= 2e-4 * y.norm() * size + 1e-30


@needs_library
@pytest.mark.parametrize("tokens", [1, 4])
def test_one_thread_and_two_and_a_second_run_give_the_same_bits(tokens, split):
    _, parts, scheme = split(1100, 1000, 50, **GRIDS[0])  # enough work for two
    x, threads, found = torch.randn(tokens, 1000), torch.get_num_threads(), []
    try:
        for number in (1, 2, 2):
            torch.set_num_threads(number)
            found.append(cpu.linear(x, stored(parts), None, 1000, scheme.grid.columns(1000), fast=True))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[1], found[2])


@fast_only
def test_one_token_gives_the_same_bits_alone_and_among_four(split):
    _, parts, scheme = split(22, 300, 9, **GRIDS[0])
    x, group = torch.randn(4, 300), scheme.grid.columns(300)
    together = fast_linear(x, parts, 300, group)
    alone = [fast_linear(x[i : i + 1], parts, 300, group) for i in range(4)]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.usefixtures("_fresh_compiler")
def test_compiled_and_with_gradients_it_computes_the_same(split):
    _, parts, scheme = split(33, 200, 9, **GRIDS[0])
    layer = SVDQLinear(200, 33, scheme, bias=False, fast=True)
    layer.load_parts(parts)
    x = torch.randn(2, 200)
    with torch.no_grad():
        expected = layer(x)
    assert torch.equal(layer(x), expected)
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), expected)
    found = torch.library.opcheck(
        torch.ops.svdq.linear.default, (x, *stored(parts), None, 200, scheme.grid.columns(200), True)
    )
    assert set(found.values()) == {"SUCCESS"}


@pytest.fixture
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_the_choice_reaches_the_layers_and_no_file():
    config = SVDQConfig(k=4, compute="fast")
    assert "compute" not in config.to_dict()  # an older release reads what this one writes
    assert config != SVDQConfig(k=4)
    config.update(k=5)
    assert config.compute == "fast"
    model = quantize_model(nn.Sequential(nn.Linear(64, 32)), config)
    assert model[0].fast
    assert not set_compute(model, "exact")[0].fast
    assert set_compute(model, "fast")[0].fast


def test_what_it_cannot_be_is_an_error():
    with pytest.raises(ValueError, match="compute='quick': must be one of"):
        SVDQConfig(compute="quick")
    with pytest.raises(ValueError, match="compute='quick': must be one of"):
        set_compute(nn.Linear(8, 8), "quick")
    with pytest.raises(ValueError, match="Linear has no layer that svdq_hf quantized"):
        set_compute(nn.Linear(8, 8), "fast")


def test_a_model_that_is_quantized_while_it_loads_has_it_and_its_file_does_not(tmp_path):
    tiny.llama().save_pretrained(tmp_path / "dense")
    config = SVDQConfig(k=4, compute="fast")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)
    layers = [layer for _, layer in svdq_layers(model)]
    assert layers
    assert all(layer.fast for layer in layers)
    model.save_pretrained(tmp_path / "packed")
    assert (
        "compute" not in json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    )
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert not any(layer.fast for _, layer in svdq_layers(again))
