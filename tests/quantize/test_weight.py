"""One weight: checked, scored once, encoded; what is prepared for that."""

import pytest
import torch
from torch import nn

from svdq_hf import SVDQConfig, quantize_model
from svdq_hf.calibration.inputs import InputStatistics
from svdq_hf.quantize import prepared
from svdq_hf.quantize.expert_stream import LazyStack
from svdq_hf.quantize.prepared import Prepared
from svdq_hf.quantize.weight import errors_at, quantize_stack, quantize_weight, score_weight

CONFIG = SVDQConfig(k=9)


def inputs(in_features):
    found = InputStatistics()
    found.add(torch.randn(200, in_features), with_gram=True)
    return found


@pytest.mark.parametrize("saliency", ["svd", "magnitude", "awq", "spqr", "relative", "random"])
@pytest.mark.parametrize("choices", [{}, {"column_scale": False}, {"error_feedback": True}], ids=str)
def test_scores_known_already_give_the_same_parts_and_facts(saliency, choices):
    weight, seen = torch.randn(40, 70), inputs(70)
    config = SVDQConfig(k=9, saliency=saliency, **choices)
    parts, facts = quantize_weight(weight, config, "layer", seen)
    again, told = quantize_weight(weight, config, "layer", seen, score_weight(weight, config, "layer", seen))
    assert told == facts
    assert parts.keys() == again.keys()
    assert all(torch.equal(parts[name], again[name]) for name in parts)


@pytest.mark.parametrize("feedback", [False, True])
def test_the_column_scale_is_found_once(feedback, monkeypatch):
    found = []
    real = prepared.column_scale
    monkeypatch.setattr(prepared, "column_scale", lambda *given: found.append(1) or real(*given))
    config = SVDQConfig(k=9, error_feedback=feedback)
    quantize_weight(torch.randn(40, 70), config, "layer", inputs(70))
    assert len(found) == 1
    errors_at(torch.randn(40, 70), config, "layer", [0, 5, 50], inputs(70))
    assert len(found) == 2


def test_errors_are_those_of_rounding_without_feedback():
    weight, seen = torch.randn(40, 70), inputs(70)
    plain = errors_at(weight, CONFIG, "layer", [9])
    assert errors_at(weight, CONFIG.replace(error_feedback=True), "layer", [9], seen) == plain
    assert plain[9] == quantize_weight(weight, CONFIG, "layer")[1]["relative_error"]


def test_a_float32_weight_is_prepared_without_a_copy_and_stays_as_it_is():
    weight = torch.randn(40, 70)
    before = weight.clone()
    found = Prepared(weight, CONFIG)
    assert found.dense.data_ptr() == weight.data_ptr()
    assert found.normalized is not found.normalized  # none is kept
    quantize_weight(weight, CONFIG, "layer", inputs(70))
    assert torch.equal(weight, before)


@pytest.mark.parametrize("shape", [(8, 0), (0, 8), (8,), (2, 8, 8)], ids=str)
def test_a_weight_that_is_no_matrix_or_empty_is_named_with_the_remedy(shape):
    with pytest.raises(ValueError, match=r"could not quantize a\.b: its weight has the shape .*\['a\.b'\]"):
        quantize_weight(torch.ones(shape), CONFIG, "a.b")


def test_an_expert_of_another_shape_is_named():
    stack = LazyStack((3, 8, 64), [torch.randn(8, 64), torch.randn(6, 64), torch.randn(8, 64)])
    with pytest.raises(
        ValueError, match=r"experts\.up, expert 1: its weight is \[6, 64\], of the others \[8"
    ):
        quantize_stack(stack, CONFIG, "experts.up")


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_an_empty_layer_stops_before_anything_is_converted():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(0, 64), nn.Linear(64, 64))
    with pytest.raises(ValueError, match=r"could not quantize 1: its weight has the shape \(64, 0\)"):
        quantize_model(model, CONFIG)
    assert [type(layer) for layer in model] == [nn.Linear] * 3
