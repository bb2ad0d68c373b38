import pytest
import torch
from tiny_models import bert_config
from torch import nn
from transformers import BertModel, T5Config, T5ForConditionalGeneration

from svdq_hf import SVDQConfig, SVDQLinear, quantize_model
from svdq_hf.calibration.inputs import InputStatistics, collect_inputs
from svdq_hf.core.saliency import BY_LOSS, data_needs, saliency_names, score
from svdq_hf.core.topk import top_positions
from svdq_hf.quantize.selection import layers_to_convert

FROM_DATA = [name for name in saliency_names() if data_needs(name)]
FROM_INPUTS = [name for name in FROM_DATA if set(BY_LOSS).isdisjoint(data_needs(name))]
"""Scores that look at a layer's inputs alone, and not at the loss."""


def positions(name: str, weight: torch.Tensor, k: int, **inputs: object) -> list[list[int]]:
    return torch.stack(top_positions(score(name, weight, inputs).scores, k)).T.tolist()


@pytest.mark.parametrize("name", FROM_INPUTS)
@pytest.mark.parametrize("c", [1.0, 0.37, 1e-6])
def test_inputs_that_are_all_alike_leave_the_choice_to_magnitude(name, c):
    weight = torch.randn(40, 70)
    inputs = {"input_norm": torch.full((70,), c), "input_gram": c * torch.eye(70), "tokens": 10}
    for k in (1, 64, 700):
        assert positions(name, weight, k, **inputs) == positions("magnitude", weight, k)


def test_awq_by_hand():
    weight = torch.tensor([[1.0, -2.0], [3.0, 0.5]])
    found = score("awq", weight, {"input_norm": torch.tensor([10.0, 1.0])}).scores
    assert found.tolist() == [[10.0, 2.0], [30.0, 0.5]]


def test_spqr_orders_weights_as_the_inverse_hessian_says():
    x = torch.randn(50, 12) @ torch.randn(12, 12)
    weight = torch.randn(8, 12)
    found = score("spqr", weight, {"input_gram": x.T @ x, "tokens": 50}).scores
    hessian = 2 / 50 * (x.T @ x).double()
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(12)
    expected = weight.double().square() / torch.linalg.inv(hessian).diagonal()
    # float32 Gram matrix: its 2**-24 is magnified by the condition number, at most 1/0.01 * 12
    torch.testing.assert_close(found.double().square(), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("gram", [torch.zeros(5, 5), torch.ones(5, 5)], ids=["dead", "rank-1"])
def test_spqr_of_singular_inputs_is_finite(gram):
    assert torch.isfinite(score("spqr", torch.randn(8, 5), {"input_gram": gram, "tokens": 3}).scores).all()


def test_statistics_are_those_of_all_tokens_of_all_batches():
    batches = [torch.randn(2, 5, 16), torch.randn(3, 4, 16)]
    layer = nn.Linear(16, 8)
    seen = collect_inputs(layer, {"": layer}, batches, gram=True)[""]
    x = torch.cat([batch.reshape(-1, 16) for batch in batches]).double()
    assert seen.tokens == 22
    # float32 products of 22 tokens
    torch.testing.assert_close(seen.gram.double(), x.T @ x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(seen.norm.double(), x.norm(dim=0), rtol=1e-6, atol=0)


def test_padding_has_no_say():
    model = BertModel(bert_config()).eval()
    layers = layers_to_convert(model, SVDQConfig())
    layers = {name: layer for name, layer in layers.items() if "pooler" not in name}  # sees one token
    text = torch.randint(1, 90, (1, 6))
    plain = collect_inputs(model, layers, [{"input_ids": text}], gram=True)
    padded = {
        "input_ids": torch.cat([text, torch.zeros(1, 3, dtype=torch.long)], 1),
        "attention_mask": torch.tensor([[1] * 6 + [0] * 3]),
    }
    masked = collect_inputs(model, layers, [padded], gram=True)
    for name in layers:
        assert masked[name].tokens == 6
        # the same tokens through a wider batch: float32 rounding
        torch.testing.assert_close(masked[name].gram, plain[name].gram, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("decoder_length", [4, 7], ids=["shorter", "as-long"])
def test_encoder_and_decoder_are_masked_each_by_its_own(decoder_length):
    model = T5ForConditionalGeneration(
        T5Config(vocab_size=50, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4)
    ).eval()
    layers = layers_to_convert(model, SVDQConfig())
    mask = torch.tensor([[1] * 5 + [0] * 2])
    decoder_mask = torch.tensor([[1] * 3 + [0] * (decoder_length - 3)])
    batch = {
        "input_ids": torch.randint(1, 50, (1, 7)),
        "attention_mask": mask,
        "decoder_input_ids": torch.randint(1, 50, (1, decoder_length)),
        "decoder_attention_mask": decoder_mask,
    }
    seen = {name: found.tokens for name, found in collect_inputs(model, layers, [batch]).items()}
    assert seen["encoder.block.0.layer.0.SelfAttention.q"] == 5
    assert seen["decoder.block.0.layer.0.SelfAttention.q"] == 3
    assert seen["decoder.block.0.layer.1.EncDecAttention.q"] == 3
    assert seen["decoder.block.0.layer.1.EncDecAttention.k"] == 5
    assert seen["decoder.block.1.layer.2.DenseReluDense.wi"] == 3


@pytest.mark.parametrize("name", FROM_INPUTS)
def test_quantize_model_with_batches(name):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16)).train()
    weight = model[2].weight.detach().clone()
    batches = [(torch.randn(20, 64),), torch.randn(5, 64)]
    hidden = torch.cat([model[:2](x).detach() for x in (batches[0][0], batches[1])])
    quantize_model(model, SVDQConfig(k=9, saliency=name), batches)
    assert isinstance(model[0], SVDQLinear)
    assert model.training
    assert model[2].training
    statistics = InputStatistics()
    statistics.add(hidden, with_gram=True)
    known = {"input_norm": statistics.norm, "input_gram": statistics.gram, "tokens": 25}
    found = torch.stack([model[2].salient_rows, model[2].salient_columns]).T.tolist()
    assert found == positions(name, weight, 9, **known)


@pytest.mark.parametrize("name", FROM_DATA)
def test_without_data_the_error_says_how_to_give_it(name, tmp_path):
    model = BertModel(bert_config())
    with pytest.raises(ValueError, match=r"needs .* call quantize_model\(model, config, batches\)"):
        quantize_model(model, SVDQConfig(saliency=name))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"needs .* call quantize_model\(model, config, batches\)"):
        BertModel.from_pretrained(tmp_path, quantization_config=SVDQConfig(saliency=name))
    assert not any(isinstance(module, SVDQLinear) for module in model.modules())


class _HalfUsed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(64, 8), nn.Linear(64, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(x)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "used: no batch reached this layer"),
        ([torch.zeros(2, 64)], "unused: no batch reached this layer"),
        ([torch.full((2, 64), torch.nan)], "used: its inputs have a NaN"),
    ],
    ids=["none", "half", "nan"],
)
def test_layers_without_usable_inputs_are_named_and_the_model_is_left_alone(batches, message):
    model = _HalfUsed()
    with pytest.raises(ValueError, match=message):
        quantize_model(model, SVDQConfig(saliency="awq"), batches)
    assert type(model.used) is nn.Linear
    assert not model.used._forward_pre_hooks


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ({"input_ids": torch.zeros(1, 2)}, "put a single one into a list"),
        (torch.zeros(2, 64), "put a single one into a list"),
        ("a text", "put a single one into a list"),
        (["a text"], "batch 'a text' is a text"),
    ],
    ids=["mapping", "tensor", "text", "texts"],
)
def test_what_is_no_list_of_batches_is_refused(batches, message):
    with pytest.raises(ValueError, match=message):
        quantize_model(nn.Sequential(nn.Linear(64, 8)), SVDQConfig(saliency="awq"), batches)


IDS = [[1, 2, 3], [4, 5, 6]]
NOT_BATCHES = {
    "a number": (5, TypeError, "batches=5 .*must be a list of batches"),
    "numbers": ([1, 2], ValueError, r"batch 1 \(int\) has no tensor"),
    "lists of ids": (IDS, ValueError, r"batch \[1, 2, 3\] \(list\) has no tensor: give what the model takes"),
    "tuples of lists": ([(IDS,)], ValueError, r"\(tuple\) has no tensor"),
    "arrays": ([torch.tensor(IDS).numpy()], ValueError, r"\(ndarray\) has no tensor"),
    "lists of texts": ([["a b", "c"]], ValueError, r"batch \['a b', 'c'\] \(list\) has no tensor"),
    "nothing": ([None], ValueError, r"batch None \(NoneType\) has no tensor"),
    "no tensors": ([{"input_ids": IDS}], ValueError, "a batch's 'input_ids' is a list, not a tensor"),
}


@pytest.mark.parametrize(("batches", "error", "message"), NOT_BATCHES.values(), ids=NOT_BATCHES)
def test_what_is_no_batch_is_named_with_the_remedy(batches, error, message):
    model = BertModel(bert_config())
    with pytest.raises(error, match=message):
        quantize_model(model, SVDQConfig(saliency="awq", k=4), batches)
    assert not any(isinstance(module, SVDQLinear) for module in model.modules())


@pytest.mark.parametrize(
    "batch",
    [{"input_ids": torch.tensor(IDS), "attention_mask": None, "use_cache": False}, (torch.tensor(IDS), None)],
    ids=["mapping", "tuple"],
)
def test_a_batch_may_hold_more_than_tensors(batch):
    model = BertModel(bert_config())
    name = "encoder.layer.0.output.dense"
    seen = collect_inputs(model, {name: model.get_submodule(name)}, [batch])
    assert seen[name].tokens == 6
