"""ReQuant: the rounds, the budget, what is stored, and what the loss wins."""

from itertools import pairwise

import pytest
import torch
from tiny_models import LOUD, llama, tokens

from svdq_hf import SVDQConfig, footprint, quantize_model
from svdq_hf.calibration.inputs import collect_inputs
from svdq_hf.quantize.requant import OUTLIERS, ROUNDS, ReQuant
from svdq_hf.quantize.rounding_lines import lines_of
from svdq_hf.quantize.sensitivity import linear

CONFIGS = {
    "default": SVDQConfig(k=20),
    "best": SVDQConfig.best(k=0.01),
    "calibrated": SVDQConfig.calibrated(k=0.01),
    "paper": SVDQConfig.paper(k=20),
    "3 bits": SVDQConfig(k=20, bits=3),
    "a budget": SVDQConfig(target_bits=5.5),
}


def batches() -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": tokens(4, 20)} for _ in range(2)]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_any_grid_and_the_file_loads_as_any_other(config, tmp_path):
    config = config.replace(saliency="requant")
    plain = llama()
    quantize_model(plain, config.replace(saliency="magnitude"), batches() if config.error_feedback else None)
    model = llama()
    quantize_model(model, config, batches())
    found, theirs = footprint(model), footprint(plain)
    assert sum(layer.k for layer in found.layers) == sum(layer.k for layer in theirs.layers)
    assert found.bits_per_weight == pytest.approx(theirs.bits_per_weight)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    given = {"input_ids": tokens()}
    assert torch.equal(loaded(**given).logits, model(**given).logits)
    assert {layer.name: layer.k for layer in footprint(loaded).layers} == {
        layer.name: layer.k for layer in found.layers
    }


def test_layers_get_what_their_weights_are_worth_to_the_loss():
    model = llama()
    quantize_model(model, SVDQConfig(k=20, saliency="requant"), batches())
    counts = [layer.k for layer in footprint(model).layers]
    assert sum(counts) == 20 * len(counts)
    assert len(set(counts)) > 3


def test_the_rounds_spend_half_of_what_is_left(monkeypatch):
    model, config, seen = llama(), SVDQConfig(saliency="requant"), []
    own = ReQuant._sizes

    def sizes(self, kept, number):
        seen.append({name: set(places.tolist()) for name, places in kept.items()})
        return own(self, kept, number)

    monkeypatch.setattr(ReQuant, "_sizes", sizes)
    found = ReQuant(model, linear(model, config), config, batches(), {}).order(1000)
    counts = [sum(map(len, kept.values())) for kept in seen]
    assert len(counts) == ROUNDS + 1
    assert counts[0] == 0
    assert 0.95 * OUTLIERS * 1000 < counts[1] <= OUTLIERS * 1000  # each layer's share is rounded down
    assert counts[2] == (counts[1] + 1000) // 2
    for earlier, later in pairwise(seen):
        assert all(places <= later[name] for name, places in earlier.items())
    assert sum(int(scores.isinf().sum()) for scores in found.values()) == counts[-1]


@pytest.mark.parametrize(("feedback", "given"), [(True, True), ("synthetic", False)])
def test_errors_are_fed_back_in_the_rounds_by_batches_of_the_users(feedback, given, monkeypatch):
    fed = []
    own = ReQuant._sizes

    def sizes(self, kept, number):
        fed.append(set(self.seen))
        return own(self, kept, number)

    monkeypatch.setattr(ReQuant, "_sizes", sizes)
    model, config = llama(), SVDQConfig(k=4, saliency="requant", error_feedback=feedback)
    names = set(linear(model, config))
    quantize_model(model, config, batches() if given else None)
    assert fed == [names if given else set()] * (ROUNDS + 1)


def test_feedback_is_part_of_what_a_round_rounds():
    model, config = llama(), SVDQConfig(error_feedback=True)
    layers = linear(model, config)
    seen = collect_inputs(model, layers, batches(), gram=True)
    plain, fed = lines_of(layers, config), lines_of(layers, config, None, seen)
    expected = quantize_model(llama(), SVDQConfig(k=0, error_feedback=True), batches())
    name = next(iter(layers))
    assert torch.equal(fed[name].rounded(), expected.get_submodule(name).dequantize())
    assert not torch.equal(plain[name].rounded(), fed[name].rounded())


def test_a_weight_that_is_kept_costs_nothing_more():
    model, config = llama(), SVDQConfig(saliency="requant")
    layers = linear(model, config)
    requant = ReQuant(model, layers, config, batches(), {})
    kept = {name: torch.arange(5) * 7 for name in layers}
    for name, sizes in requant._sizes(kept, 1).items():
        assert not sizes.flatten()[kept[name]].any()
        assert bool((sizes >= 0).all())
        assert sizes.any()


def loud() -> torch.nn.Module:
    """A model to whose answers its layers matter."""
    model = llama()
    for name, weight in model.named_parameters():
        if weight.ndim == 2 and "embed" not in name:
            weight.data *= LOUD
    return model


@torch.no_grad()
def own_words(model: torch.nn.Module, count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Texts that a model writes: no other model knows them better, as if it had been trained on them."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 96, (count, 1), generator=generator)
    for _ in range(23):
        chances = model(input_ids=ids).logits[:, -1].softmax(-1)
        ids = torch.cat([ids, torch.multinomial(chances, 1, generator=generator)], 1)
    return [{"input_ids": part} for part in ids.split(16)]


def test_a_trained_model_loses_less_on_texts_that_were_not_seen():
    """KL is the change of the loss over all texts that the dense model could write, without their noise."""
    dense = loud()
    given, held = own_words(dense, 96, 1), own_words(dense, 48, 2)
    found = {}
    for saliency in ("relative", "pqi", "requant"):
        config = SVDQConfig(k=0.01, bits=3, saliency=saliency)
        model = quantize_model(loud(), config, None if saliency == "relative" else given)
        found[saliency] = divergence(dense, model, held)
    assert found["requant"] < 0.95 * found["relative"], found
    assert found["requant"] < found["pqi"], found


@torch.no_grad()
def divergence(dense: torch.nn.Module, model: torch.nn.Module, held: list[dict[str, torch.Tensor]]) -> float:
    """Mean of KL(dense || model) over the tokens of some texts."""
    pairs = [[one(**batch).logits.log_softmax(-1) for one in (dense, model)] for batch in held]
    found = [(mine.exp() * (mine - theirs)).sum(-1).mean() for mine, theirs in pairs]
    return float(sum(found)) / len(found)


def test_without_data_it_says_what_it_needs():
    with pytest.raises(ValueError, match=r"saliency 'requant' needs .*, which only data can give"):
        quantize_model(llama(), SVDQConfig(saliency="requant"))
