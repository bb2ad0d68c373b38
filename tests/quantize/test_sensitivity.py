import pytest
import torch
from tiny_models import bert, llama, tokens
from torch import nn

import svdq_hf
from svdq_hf import SVDQConfig, footprint, quantize_model
from svdq_hf.quantize.budget import by_loss
from svdq_hf.quantize.rounding_lines import lines_of
from svdq_hf.quantize.selection import layers_to_convert
from svdq_hf.quantize.sensitivity import pqi, sensitivity


def batches() -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": tokens(4, 20)} for _ in range(2)]


@pytest.mark.parametrize("config", [SVDQConfig(), SVDQConfig.paper(), SVDQConfig(bits=3)])
def test_pqi_sums_to_the_true_change_of_the_loss(config):
    found = sensitivity(llama(), batches(), config, steps=32)
    assert found.change != 0
    assert found.predicted == pytest.approx(found.change, rel=0.01)
    assert [layer.pqi for layer in found.layers] == sorted((one.pqi for one in found.layers), reverse=True)
    assert {layer.name for layer in found.layers} == layers_to_convert(llama(), config).keys()


def test_a_one_sided_sum_comes_nearer_with_its_steps_and_the_midpoint_faster():
    model, given = llama(), batches()
    config = SVDQConfig.paper()
    off = {}
    for rule, steps in (("left", 8), ("left", 32), ("midpoint", 8)):
        found = sensitivity(model, given, config, steps=steps, rule=rule)
        off[rule, steps] = abs(found.predicted - found.change)
    assert off["left", 8] >= 3 * off["left", 32]
    assert off["midpoint", 8] < off["left", 32]


def test_rows_and_weights_sum_to_their_layer():
    found = sensitivity(llama(), batches(), steps=2)
    for layer in found.layers:
        terms = found.terms[layer.name]
        assert terms.shape == layer.shape
        assert layer.rows == pytest.approx(terms.double().sum(1).tolist())
        assert layer.pqi == pytest.approx(sum(layer.rows))
    assert "rows" in found.to_dict()["layers"][0]
    assert "rows" not in found.to_dict(rows=False)["layers"][0]


def test_a_model_in_half_precision_gives_about_the_same():
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        model = llama().to(torch.bfloat16).to(dtype)
        terms = sensitivity(model, batches(), SVDQConfig(bits=3), steps=1).terms
        found.append(torch.cat([one.flatten() for one in terms.values()]))
    assert all(terms.dtype == torch.float32 for terms in found)
    assert float(torch.corrcoef(torch.stack(found))[0, 1]) > 0.99


def test_taylor_is_the_sum_at_the_dense_weights():
    found = sensitivity(llama(), batches(), steps=1, rule="left")
    assert found.predicted == pytest.approx(found.first_order)


def test_the_loss_of_the_rounded_model_is_that_of_the_quantized_one():
    model, given = llama(), batches()
    found = sensitivity(model, given, SVDQConfig(k=0), steps=1)
    dense = sum(float(model(**one, labels=one["input_ids"]).loss.detach()) for one in given) / 2
    quantize_model(model, SVDQConfig(k=0))
    rounded = sum(float(model(**one, labels=one["input_ids"]).loss.detach()) for one in given) / 2
    assert found.dense_loss == pytest.approx(dense, abs=1e-5)
    assert found.rounded_loss == pytest.approx(rounded, abs=1e-5)


def test_weights_that_pqi_keeps_win_more_than_random_ones():
    given, losses = batches(), {}
    for saliency in ("pqi", "random"):
        model = llama()
        config = SVDQConfig(k=0.005, saliency=saliency, bits=3)
        quantize_model(model, config, given if saliency == "pqi" else None)
        losses[saliency] = sum(float(model(**one, labels=one["input_ids"]).loss.detach()) for one in given)
    assert losses["pqi"] < losses["random"]


def test_a_budget_follows_the_loss():
    model, given = llama(), batches()
    config = SVDQConfig(saliency="pqi", target_bits=5.5)
    layers = layers_to_convert(model, config)
    terms = pqi(model, lines_of(layers, config), given)
    quantize_model(model, config, given)
    counts = {layer.name: layer.k for layer in footprint(model).layers}
    kept = sum(counts.values())
    threshold = torch.cat([one.flatten() for one in terms.values()]).sort(descending=True).values[kept - 1]
    assert kept > 0
    for name, count in counts.items():
        assert count == int((terms[name] >= threshold).sum()), name
    assert footprint(model).bits_per_weight == pytest.approx(5.5, abs=0.01)


def test_salient_weights_have_the_largest_pqi():
    model, given = llama(), batches()
    config = SVDQConfig(k=10, saliency="pqi")
    terms = pqi(model, lines_of(layers_to_convert(model, config), config), given)
    quantize_model(model, config, given)
    layer = model.model.layers[1].mlp.down_proj
    kept = terms["model.layers.1.mlp.down_proj"][layer.salient_rows.long(), layer.salient_columns.long()]
    assert sorted(kept.tolist(), reverse=True) == pytest.approx(
        terms["model.layers.1.mlp.down_proj"].flatten().topk(10).values.tolist()
    )


def test_the_size_of_pqi_is_the_root_of_its_squares_over_sequences_by_hand():
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 8, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x).sum() / x.shape[0]

    torch.manual_seed(0)
    model = Sum()
    x = torch.randn(2, 3, 64)  # two sequences of three tokens: the gradient is the sum of the tokens
    lines = lines_of({"layer": model.layer}, SVDQConfig())
    found = pqi(model, lines, [x], lambda one, batch: one(batch))["layer"]
    squares = x.sum(1).div(2).square().sum(0)
    expected = lines["layer"].difference().abs() * squares.sqrt()
    assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"batches": []}, "no batch"),
        ({"batches": {"input_ids": tokens()}}, "list of batches"),
        ({"steps": 0}, "steps=0: must be at least 1"),
        ({"rule": "middle"}, "rule='middle': must be one of"),
    ],
)
def test_wrong_arguments(arguments, words):
    with pytest.raises(ValueError, match=words):
        sensitivity(**{"model": llama(), "batches": batches(), **arguments})


def test_a_model_without_a_loss_is_told_to_bring_labels():
    with pytest.raises(ValueError, match="needs 'labels'"):
        svdq_hf.sensitivity(bert(), batches())


def test_without_data_the_score_says_what_it_needs():
    with pytest.raises(ValueError, match=r"saliency 'pqi' needs .*sensitivity.*, which only data can give"):
        quantize_model(llama(), SVDQConfig(saliency="pqi"))


def test_a_budget_takes_equal_terms_in_order_and_nothing_that_rounding_helps():
    terms = {"a": torch.tensor([[2.0, 1.0]]), "b": torch.tensor([[1.0, 1.0], [-1.0, 0.0]])}
    assert by_loss(terms, 0) == {"a": 0, "b": 0}
    assert by_loss(terms, 3) == {"a": 2, "b": 1}
    assert by_loss(terms, 6) == {"a": 2, "b": 2}
    terms["b"][1, 0] = torch.inf
    assert by_loss(terms, 1) == {"a": 0, "b": 1}
