import json
from functools import partial

import pytest
import tiny_models as tiny
import torch
from torch import nn
from transformers import LlamaForCausalLM

import svdq_hf.quantize.input_statistics
import svdq_hf.quantize.requant
from svdq_hf import SVDQConfig, quantize_model
from svdq_hf.calibration.inputs import collect_inputs
from svdq_hf.calibration.synthetic import synthetic_batches
from svdq_hf.cli.command import main
from svdq_hf.core.error_feedback import damped
from svdq_hf.hub.card import model_card
from svdq_hf.nn.inventory import svdq_layers
from svdq_hf.quantize.input_statistics import LOSS_BATCHES
from svdq_hf.quantize.selection import layers_to_convert

SYNTHETIC = SVDQConfig(k=9, error_feedback="synthetic")


def ids(model: nn.Module, **choices: int) -> torch.Tensor:
    return torch.cat([batch["input_ids"] for batch in synthetic_batches(model, **choices)])


@pytest.mark.parametrize("build", [tiny.bert, tiny.llama], ids=["reads", "writes"])
def test_the_tokens_are_of_the_vocabulary_and_the_seeds(build):
    model = build()
    found = ids(model, tokens=300)
    assert found.shape[1] == 40  # as long as the model can read
    assert 300 <= found.numel() < 340
    assert found.min() >= 0
    assert found.max() < tiny.VOCABULARY
    state = torch.get_rng_state()
    assert torch.equal(ids(model, tokens=300), found)
    assert not torch.equal(ids(model, tokens=300, seed=1), found)
    assert torch.equal(torch.get_rng_state(), state)


def test_random_tokens_are_drawn_evenly():
    counts = torch.bincount(ids(tiny.bert()).flatten(), minlength=tiny.VOCABULARY)
    # 8192 draws of 96: 85 each, give or take 9; five times that far is one in a million
    assert (counts - 8192 / 96).abs().max() < 5 * (8192 / 96) ** 0.5


def test_a_decoder_writes_its_own_words_behind_its_first_token():
    model = tiny.llama().train()
    model.lm_head.weight.data.mul_(20)  # which makes it sure of them
    found = ids(model, tokens=400)
    assert model.training
    assert (found[:, 0] == model.config.bos_token_id).all()
    other = torch.randint(tiny.VOCABULARY, found.shape)
    other[:, 0] = found[:, 0]
    with torch.no_grad():
        losses = [float(model.eval()(input_ids=text, labels=text).loss) for text in (found, other)]
    assert losses[0] < losses[1] - 1  # in nats


def test_a_decoder_without_a_first_token_starts_anywhere():
    first = ids(tiny.llama(bos_token_id=None), tokens=800)[:, 0]
    assert first.unique().numel() > 10


def test_an_encoder_and_a_decoder_both_read():
    model = tiny.t5()
    batches = synthetic_batches(model, tokens=100)
    assert set(batches[0]) == {"input_ids", "decoder_input_ids"}
    seen = collect_inputs(model, layers_to_convert(model, SYNTHETIC), batches)
    assert len(seen) > 0


def test_a_model_that_reads_pictures_beside_tokens_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"CLIPModel does not run on token ids alone .*with batches of your"):
        quantize_model(tiny.clip(), SYNTHETIC)


@pytest.mark.parametrize(
    "model", [tiny.dinov2(), nn.Sequential(nn.Linear(64, 64))], ids=["pictures", "torch"]
)
def test_a_model_that_reads_no_tokens_is_refused_with_the_remedy(model):
    with pytest.raises(ValueError, match=r"reads no token ids.*quantize_model\(model, config, batches\)"):
        quantize_model(model, SYNTHETIC)


@pytest.mark.parametrize("build", [tiny.bert, tiny.classifier, tiny.llama, tiny.t5])
def test_outputs_are_nearer_than_without(build, tmp_path):
    batch = {"input_ids": tiny.tokens(16, 30)}
    if build is tiny.t5:
        batch["decoder_input_ids"] = tiny.tokens(16, 30)
    lost = []
    for feedback in ("synthetic", False):
        dense, config = build(), SVDQConfig(k=9, error_feedback=feedback)
        with torch.no_grad():
            expected = dense(**batch)[0]
            model = quantize_model(build(), config)
            lost.append(float((model(**batch)[0] - expected).square().mean()))
        model.save_pretrained(tmp_path / str(feedback))
        assert tiny.different_tensors(type(model).from_pretrained(tmp_path / str(feedback)), model) == []
    assert lost[0] < lost[1]
    stored = json.loads((tmp_path / "synthetic" / "config.json").read_text())["quantization_config"]
    assert (stored["error_feedback"], stored["format_version"]) == ("synthetic", 2)
    assert "none, but synthetic batches, for how inputs vary together" in model_card(tmp_path / "synthetic")


def test_while_loading_it_is_refused_and_says_how(tmp_path):
    tiny.bert().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"runs the dense model.*quantize_model\(model, config\)"):
        type(tiny.bert()).from_pretrained(tmp_path, quantization_config=SYNTHETIC)


def test_batches_beside_it_are_refused():
    with pytest.raises(ValueError, match="makes its batches: leave yours out, or say error_feedback=True"):
        quantize_model(tiny.bert(), SYNTHETIC, [tiny.text()])


def test_what_is_added_is_even_as_the_grid_sees_the_columns():
    gram, per_column = torch.randn(50, 6), torch.rand(6) + 0.5
    gram = gram.T @ gram
    seen = gram * per_column * per_column[:, None]
    added = damped(gram, per_column, 0.5) * per_column * per_column[:, None] - seen
    # float32 sums of 50 squares
    torch.testing.assert_close(added, 0.5 * seen.diagonal().mean() * torch.eye(6), atol=1e-4, rtol=1e-5)


def test_damping_is_chosen_or_one_of_synthetic_batches():
    assert SYNTHETIC.extra_damping == 1.0
    assert SVDQConfig.calibrated().extra_damping == 0.0
    assert SVDQConfig.calibrated(damping=0.3).extra_damping == 0.3


@pytest.mark.parametrize("saliency", ["pqi", "requant"])
def test_the_loss_is_followed_on_all_batches_that_are_given_and_on_some_that_are_made(saliency, monkeypatch):
    seen = []

    def followed(model, lines, batches, pass_of=""):
        seen.append([batch["input_ids"] for batch in batches])
        return {name: torch.zeros_like(line.dense()) for name, line in lines.items()}

    for module in (svdq_hf.quantize.input_statistics, svdq_hf.quantize.requant):
        monkeypatch.setattr(module, "pqi", followed)
    written = synthetic_batches(tiny.llama())
    assert len(written) > LOSS_BATCHES
    for feedback, batches, count in (("synthetic", None, LOSS_BATCHES), (True, written, len(written))):
        config = SVDQConfig(k=4, saliency=saliency, error_feedback=feedback)
        quantize_model(tiny.llama(), config, batches)
        expected = [batch["input_ids"] for batch in written[:count]]
        assert all(torch.equal(a, b) for a, b in zip(seen[-1], expected, strict=True))


def test_a_budget_that_cannot_be_met_is_refused_before_a_text_is_written(monkeypatch):
    monkeypatch.setattr(svdq_hf.quantize.input_statistics, "synthetic_batches", None)
    with pytest.raises(ValueError, match=r"target_bits=3\.0"):
        quantize_model(tiny.llama(), SVDQConfig.self_calibrated(target_bits=3.0))


@pytest.mark.parametrize("family", ["whisper", "vit"])
def test_the_remedy_of_a_model_that_reads_no_tokens_works(family):
    make = tiny.FAMILIES[family].build
    with pytest.raises(ValueError, match=r"take SVDQConfig\.best\(\) \(--preset best\)"):
        quantize_model(make(), SVDQConfig.self_calibrated())
    assert sum(1 for _ in svdq_layers(quantize_model(make(), SVDQConfig.best()))) > 0


@pytest.fixture
def few(monkeypatch):
    made = partial(synthetic_batches, tokens=400)
    monkeypatch.setattr(svdq_hf.quantize.input_statistics, "synthetic_batches", made)
    return made


def test_pqi_reads_what_a_causal_model_writes(few):
    found = quantize_model(tiny.llama(), SVDQConfig.best(saliency="pqi", error_feedback="synthetic"))
    given = SVDQConfig.best(saliency="pqi", error_feedback=True, damping=1)
    assert tiny.different_tensors(found, quantize_model(tiny.llama(), given, few(tiny.llama()))) == []


def test_requant_reads_what_a_causal_model_writes_and_feeds_nothing_back_in_its_rounds(few):
    found = quantize_model(tiny.llama(), SVDQConfig.self_calibrated())
    plain = quantize_model(tiny.llama(), SVDQConfig.best(saliency="requant"), few(tiny.llama()))
    layers = zip(svdq_layers(found), svdq_layers(plain), strict=True)
    assert all(
        torch.equal(ours.salient_rows, theirs.salient_rows)
        and torch.equal(ours.salient_columns, theirs.salient_columns)
        for (_, ours), (_, theirs) in layers
    )
    assert tiny.different_tensors(found, plain) != []  # codes, by feedback


@pytest.mark.usefixtures("few")
def test_the_preset_is_quantized_on_the_command_line_and_loads_the_same(tmp_path):
    tiny.llama().save_pretrained(tmp_path / "dense")
    command = ["quantize", str(tmp_path / "dense"), str(tmp_path / "out"), "--json"]
    assert main([*command, "--preset", "self_calibrated"]) == 0
    again = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    expected = quantize_model(tiny.llama(), SVDQConfig.self_calibrated())
    assert tiny.different_tensors(again, expected) == []
    assert sum(layer.salient_values.numel() for _, layer in svdq_layers(again)) > 0
    with pytest.raises(ValueError, match="load it dense and call quantize_model"):
        LlamaForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=SVDQConfig.self_calibrated())


@pytest.mark.parametrize("saliency", ["pqi", "requant"])
@pytest.mark.parametrize("make", [tiny.bert, tiny.t5])
def test_a_score_by_the_loss_is_refused_at_once_where_a_model_writes_nothing(make, saliency, monkeypatch):
    monkeypatch.setattr(svdq_hf.quantize.input_statistics, "synthetic_batches", None)  # none is made
    with pytest.raises(ValueError, match=f"saliency '{saliency}' follows a loss, .* give batches"):
        quantize_model(make(), SVDQConfig.best(saliency=saliency, error_feedback="synthetic"))


def test_the_more_damping_the_nearer_to_plain_rounding():
    found = {}
    for damping in (0, 1e6, None):
        feedback = damping is not None
        config = SVDQConfig(k=9, error_feedback=feedback, damping=damping)
        found[damping] = quantize_model(tiny.bert(), config, [tiny.text()] if feedback else None)
    assert tiny.different_tensors(found[1e6], found[None]) != []  # the rows' units leave room
    codes = [model.pooler.dense.dequantize() for model in found.values()]
    assert (codes[1] - codes[2]).norm() < (codes[0] - codes[2]).norm()


def test_a_models_own_way_of_writing_does_not_change_the_batches():
    model, plain = tiny.llama(), tiny.llama()
    model.generation_config.update(num_beams=3, num_return_sequences=3, return_dict_in_generate=True)
    own = model.generation_config
    found, expected = (synthetic_batches(each, tokens=256) for each in (model, plain))
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(found, expected, strict=True))
    assert model.generation_config is own


@pytest.mark.parametrize("build", [tiny.bert, tiny.llama], ids=["reads", "writes"])
def test_the_tokens_are_where_the_model_computes_whatever_its_first_parameter(build):
    model = build()
    expected = ids(model, tokens=80)
    model.register_parameter("offloaded", nn.Parameter(torch.empty(1, device="meta")))
    assert next(model.parameters()).is_meta
    assert torch.equal(ids(model, tokens=80), expected)


def test_a_model_of_buffers_alone_gets_tokens():
    model = tiny.bert()
    expected = ids(model, tokens=80)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            delattr(module, name)
            module.register_buffer(name, parameter.detach())
    assert list(model.parameters()) == []
    assert torch.equal(ids(model, tokens=80), expected)
