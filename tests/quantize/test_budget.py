"""target_bits: one budget of bits for a whole model."""

import json
import math

import pytest
import tiny_models as tiny
import torch
import transformers as hf
from torch import nn

from svdq_hf import SVDQConfig, dequantize_model, footprint, quantize_model
from svdq_hf.checkpoint.quantize import quantize_checkpoint
from svdq_hf.quantize.budget import BudgetItem, Measured, by_gain, spend
from svdq_hf.quantize.footprint import read_footprint

CONFIG = SVDQConfig(rank=2, target_bits=7.0)
"""Of the tiny models' layers, which take about 5 bits with nothing salient."""


def ks(model):
    return {layer.name: layer.k for layer in footprint(model).layers}


def errors(model):
    found = [layer.facts["relative_error"] for layer in footprint(model).layers]
    return sum(error**2 for error in found), sum(found)


def uneven():
    """Layers of different shapes, one of which has large outliers: a salient weight is worth most there."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 128), nn.Linear(128, 64))
    with torch.no_grad():
        rows, columns = torch.randint(96, (150,)), torch.randint(64, (150,))
        model[0].weight[rows, columns] *= 30
    return model


def test_the_bits_are_those_asked_for_and_no_more():
    for bits in (5.5, 7, 10.25):
        model = quantize_model(uneven(), SVDQConfig(saliency="magnitude", target_bits=bits))
        found = footprint(model)
        assert bits - 96 / found.weights < found.bits_per_weight <= bits


def test_more_is_spent_where_it_lowers_the_error_more():
    found = ks(quantize_model(uneven(), SVDQConfig(saliency="magnitude", target_bits=6)))
    assert found["0"] > 100
    assert found["0"] > 2 * max(found["1"], found["2"])


@pytest.mark.parametrize("saliency", ["svd", "magnitude", "relative", "random"])
@pytest.mark.parametrize("k", [3, 40, 500])
def test_no_worse_than_the_same_k_everywhere(saliency, k):
    even = quantize_model(uneven(), SVDQConfig(k=k, saliency=saliency, rank=2))
    bits = footprint(even).bits_per_weight
    spent = quantize_model(uneven(), SVDQConfig(saliency=saliency, rank=2, target_bits=bits))
    assert footprint(spent).bits_per_weight <= bits
    for mine, theirs in zip(errors(spent), errors(even), strict=True):
        assert mine <= theirs


def test_a_score_that_lowers_nothing_falls_back_to_the_same_k():
    """By chance: where no piece is a gain, nothing is spent; and never more than it is worth."""
    gains = Measured({0: 0.1, 4: 0.2, 8: 0.3}).gains()
    assert gains == []
    assert by_gain({"a": gains, "b": [(1.0, 0, 4)]}, 10) == {"a": 0, "b": 4}


def test_pieces_are_those_of_the_lower_convex_hull():
    pieces = Measured({0: 1.0, 2: 0.9, 4: 0.5, 8: 0.4, 16: 0.4}).gains()
    assert [(start, end) for _, start, end in pieces] == [(0, 4), (4, 8)]
    assert pieces[0][0] == pytest.approx((1 - 0.25) / 4)
    assert pieces[1][0] == pytest.approx((0.25 - 0.16) / 4)


def test_a_budget_that_is_spent_or_that_nobody_set_is_left_alone():
    for config in (SVDQConfig(), SVDQConfig(target_bits=5, layer_k={"a": 1})):
        assert spend({"a": BudgetItem(8, 8, lambda: pytest.fail("read"))}, config, {}) is config


def test_loading_spends_as_quantizing_in_memory_does(tmp_path):
    tiny.bert().save_pretrained(tmp_path)
    loaded = hf.BertModel.from_pretrained(tmp_path, quantization_config=CONFIG)
    assert len(set(ks(loaded).values())) > 1
    assert tiny.different_tensors(loaded, quantize_model(tiny.bert(), CONFIG)) == []
    assert footprint(loaded).bits_per_weight == pytest.approx(7, abs=0.01)


@pytest.mark.parametrize("family", ["gpt2", "llama-tied"])
def test_other_families_round_trip(family, tmp_path):
    """Transposed layers, and heads that are layers too."""
    config = SVDQConfig(rank=2, target_bits=8, lm_head=True)
    dense = tiny.FAMILIES[family].loud_model()
    dense.save_pretrained(tmp_path / "dense")
    loaded = type(dense).from_pretrained(tmp_path / "dense", quantization_config=config)
    assert len(set(ks(loaded).values())) > 1
    loaded.save_pretrained(tmp_path / "quantized")
    again = type(dense).from_pretrained(tmp_path / "quantized")
    assert tiny.different_tensors(again, loaded) == []
    assert tiny.different_tensors(quantize_model(dense, config), loaded) == []
    assert again.config.quantization_config.layer_k == loaded.config.quantization_config.layer_k


def test_what_was_spent_is_in_config_json_by_the_names_in_the_file(tmp_path):
    model = quantize_model(tiny._seeded(hf.BertForSequenceClassification, tiny.bert_config()), CONFIG)
    model.save_pretrained(tmp_path / "classifier")
    stored = json.loads((tmp_path / "classifier/config.json").read_text())["quantization_config"]
    assert stored["format_version"] == 4
    assert stored["target_bits"] == 7.0
    assert stored["layer_k"] == ks(model)
    assert all(name.startswith("bert.") for name in stored["layer_k"])
    base = hf.BertModel.from_pretrained(tmp_path / "classifier")  # whose layers have no such prefix
    assert tiny.different_tensors(base, model.bert) == []
    base.save_pretrained(tmp_path / "base")
    stored = json.loads((tmp_path / "base/config.json").read_text())["quantization_config"]
    assert stored["layer_k"] == ks(base) == {name.removeprefix("bert."): k for name, k in ks(model).items()}
    again = hf.BertForSequenceClassification.from_pretrained(tmp_path / "base")
    assert tiny.different_tensors(again.bert, model.bert) == []


def test_a_folder_is_quantized_within_the_budget_and_its_card_says_so(tmp_path):
    tiny.bert().save_pretrained(tmp_path / "dense")
    quantize_checkpoint(tmp_path / "dense", tmp_path / "out", CONFIG)
    found = read_footprint(tmp_path / "out")
    assert 6.99 < found.bits_per_weight <= 7
    few, many = (edge(layer.k for layer in found.layers) for edge in (min, max))
    assert f"{few} to {many} per layer, of 7.0 bits per weight" in (tmp_path / "out/README.md").read_text()


def test_k_of_single_layers_can_be_said_by_hand():
    model = quantize_model(tiny.bert(), SVDQConfig(k=5, rank=2, layer_k={"pooler.dense": 77}))
    found = ks(model)
    assert found.pop("pooler.dense") == 77
    assert set(found.values()) == {5}


def test_a_layer_that_is_not_quantized_is_no_name_for_layer_k(tmp_path):
    tiny.bert().save_pretrained(tmp_path)
    config = SVDQConfig(layer_k={"poler.dense": 7})
    for attempt in (
        lambda: quantize_model(tiny.bert(), config),
        lambda: hf.BertModel.from_pretrained(tmp_path, quantization_config=config),
    ):
        with pytest.raises(
            ValueError, match=r"layer_k names 'poler\.dense', which is no linear layer that is quant"
        ):
            attempt()


@pytest.mark.parametrize("bits", [2, 4, 200])
def test_a_budget_that_cannot_be_met_is_refused_with_the_range(bits, tmp_path):
    config = SVDQConfig(target_bits=bits)
    least = footprint(quantize_model(tiny.bert(), SVDQConfig(k=0))).bits_per_weight
    tiny.bert().save_pretrained(tmp_path)
    message = rf"^target_bits={bits}: .* {least:.4f} bits per weight with .* and {least + 96:.4f} with"
    model = tiny.bert()
    with pytest.raises(ValueError, match=message):
        quantize_model(model, config)
    assert tiny.different_tensors(model, tiny.bert()) == []
    with pytest.raises(ValueError, match=message):
        hf.BertModel.from_pretrained(tmp_path, quantization_config=config)


def test_the_two_ends_of_the_range_are_possible():
    least = footprint(quantize_model(tiny.bert(), SVDQConfig(k=0))).bits_per_weight
    bare = quantize_model(tiny.bert(), SVDQConfig(target_bits=math.nextafter(least, 9)))
    assert set(ks(bare).values()) == {0}
    model = nn.Sequential(nn.Linear(16, 8))
    before = model[0].weight.detach().clone()
    most = footprint(quantize_model(model, SVDQConfig(k=128))).bits_per_weight
    model = quantize_model(dequantize_model(model), SVDQConfig(saliency="magnitude", target_bits=most))
    assert footprint(model).bits_per_weight == most
    assert torch.equal(model[0].dequantize(), before)


def test_a_tensor_that_several_layers_share_cannot_be_measured_before_loading(tmp_path):
    model = tiny._seeded(hf.Dinov2Model, tiny.dinov2_config())
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"target_bits: the files have no tensor for .*quantize_model\("):
        type(model).from_pretrained(tmp_path, quantization_config=CONFIG)


@pytest.mark.parametrize("bits", [0, -4.4, float("nan"), float("inf"), "4.4", True, [4]])
def test_target_bits_is_a_number(bits):
    with pytest.raises(ValueError, match=r"^target_bits=.*: must be None or a number of bits above 0"):
        SVDQConfig(target_bits=bits)


def test_another_budget_is_spent_anew():
    config = SVDQConfig(target_bits=5, layer_k={"a": 1})
    config.update(target_bits=6)
    assert (config.target_bits, config.layer_k) == (6, None)


@pytest.mark.parametrize("k", [-1, 2.5, "3", True, None, 2**63])
def test_layer_k_holds_counts(k):
    with pytest.raises(ValueError, match=r"^layer_k=.*: must be the layer's name and an int"):
        SVDQConfig.from_dict({**CONFIG.to_dict(), "layer_k": {"a": k}})


@pytest.mark.parametrize("value", [[1], "a", 3])
def test_layer_k_is_a_dict(value):
    with pytest.raises(ValueError, match=r"^layer_k=.*: must be None or k by the layer's name"):
        SVDQConfig(layer_k=value)


@pytest.mark.parametrize("change", [{"pooler.dense": 1}, {"pooler.dense": 2**62}, None])
def test_a_file_that_disagrees_with_layer_k_is_refused_by_name(change, tmp_path):
    quantize_model(tiny.bert(), CONFIG).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    stored = config["quantization_config"]
    stored["layer_k"] = None if change is None else stored["layer_k"] | change
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"salient_values is \[\d+\] torch.float32, where the config says"):
        hf.BertModel.from_pretrained(tmp_path)


def test_a_name_in_layer_k_that_the_files_do_not_hold_is_refused(tmp_path):
    model = quantize_model(tiny.llama(), SVDQConfig(k=9, layer_k={"model.layers.0.self_attn.q_proj": 3}))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["layer_k"]["model.layers.7.self_attn.q_proj"] = 3
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=r"layer_k names 'model.layers.7.self_attn.q_proj', which is no quant"
    ):
        hf.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_budgeted_model_goes_back_to_dense():
    model = quantize_model(tiny.bert(), CONFIG)
    rows = model.pooler.dense.dequantize()
    assert torch.equal(dequantize_model(model).pooler.dense.weight, rows)
