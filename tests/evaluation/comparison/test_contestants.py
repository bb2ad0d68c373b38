"""Contestants: what can be compared, what it is called, and what is refused before any work."""

import letters
import pytest
import torch
from torch import nn

from svdq_hf import SVDQConfig, quantize_model
from svdq_hf.evaluation.comparison.contestants import entrants
from svdq_hf.evaluation.comparison.sizes import size_of


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A dense folder, one quantized by svdq, and one of the first's name elsewhere."""
    folder = tmp_path_factory.mktemp("contestants")
    letters.saved("causal", folder / "model")
    letters.saved("causal", folder / "other" / "model", seed=1)
    letters.saved("masked", folder / "reads")
    model = letters.KINDS["causal"][0].from_pretrained(folder / "model")
    quantize_model(model, SVDQConfig(k=4)).save_pretrained(folder / "small")
    return folder


def names(*given):
    return [one.name for one in entrants(given[0], given[1:])]


def test_without_others_the_default_is_made(place):
    first, second = entrants(place / "model", [])
    assert (first.name, second.name, second.config) == ("model", "svdq", SVDQConfig())
    assert (first.is_there, second.is_there) == (True, False)


def test_folders_of_one_name_are_told_apart(place):
    assert names(place / "model", place / "other" / "model") == [f"{place.name}/model", "other/model"]


def test_models_in_memory_are_numbered():
    made = letters.KINDS["causal"]
    models = [made[0](made[1]()) for _ in range(3)]
    assert names(*models) == ["LlamaForCausalLM", "LlamaForCausalLM (2)", "LlamaForCausalLM (3)"]


def test_what_is_quantized_is_known(place):
    dense, ours = entrants(place / "model", [place / "small"])
    assert dense.quantization is None
    assert ours.quantization["quant_method"] == "svdq"
    assert ours.given_folder == str(place / "small")
    assert (size_of(dense).bits, size_of(dense).dense_share) == (32.0, None)
    size = size_of(ours)
    assert size.bytes == (place / "small" / "model.safetensors").stat().st_size
    assert 4 < size.bits < 9
    assert 0 < size.dense_share < 1


def test_sizes_in_memory_are_those_of_the_folder(place):
    loaded = letters.KINDS["causal"][0].from_pretrained
    for name in ("small", "model"):
        stored = size_of(entrants(place / name, [place / "other" / "model"])[0])
        held = size_of(entrants(loaded(place / name), [place / "other" / "model"])[0])
        assert held.bytes is None
        assert held.bits == pytest.approx(stored.bits, rel=1e-3)
        assert held.dense_share == (stored.dense_share and pytest.approx(stored.dense_share))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["model", "model"], "given twice; compare it with another folder, or with --preset best"),
        (["small"], "quantized already, and there is nothing to compare it with; give the original first"),
        (["small", SVDQConfig()], "quantized already; quantize the original: svdq compare ORIGINAL"),
        (["model", SVDQConfig(), SVDQConfig()], "svdq: asked for twice"),
        (["nothing"], "no config.json is there"),
        (["model", "best"], "best: no such folder; made on the way: --preset best"),
        (["model", "self-calibrated"], "made on the way: --preset self_calibrated"),
        (["reads", SVDQConfig.self_calibrated()], "BertForMaskedLM is none: .*--error-feedback synthetic"),
        (["./nowhere"], "no such folder"),
    ],
)
def test_what_makes_no_sense_is_refused(given, message, place, monkeypatch):
    monkeypatch.chdir(place)
    (place / "nothing").mkdir(exist_ok=True)
    with pytest.raises(ValueError, match=message):
        entrants(given[0], given[1:])


@pytest.mark.parametrize("wrong", [3, None, nn.Linear(2, 2), torch.zeros(3)])
def test_what_is_no_model_is_refused_by_its_type(wrong, place):
    with pytest.raises(TypeError, match=f"no {type(wrong).__name__}"):
        entrants(place / "model", [wrong])


def test_a_folder_without_a_tokenizer_has_none(place):
    dense, ours = entrants(place / "model", [place / "small"])
    assert ours.tokenizer() is None
    assert len(dense.tokenizer()) == len(letters.tokenizer())


def test_what_is_not_made_yet_cannot_be_loaded(place):
    with pytest.raises(ValueError, match="svdq: is not made yet"):
        entrants(place / "model", [])[1].loaded()
