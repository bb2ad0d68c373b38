"""Models of which weights and activations are integers: quantized, saved, loaded, made dense again."""

import json
import shutil

import pytest
import tiny_models as tiny
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from safetensors import safe_open

from svdq_hf import SVDQConfig, dequantize_model, footprint, quantize_model, read_footprint
from svdq_hf.checkpoint import quantize_checkpoint
from svdq_hf.nn.integer_linear import SVDQIntegerLinear
from svdq_hf.quantize.bases import bases_of, seen_covariances, weight_covariances
from svdq_hf.quantize.residual_stream import NotRotatable, find_stream
from svdq_hf.quantize.rotate import fold_norms

CONFIG = SVDQConfig.resq()
KINDS = {
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig, {"tie_word_embeddings": True}),
    "qwen2": (hf.Qwen2ForCausalLM, hf.Qwen2Config, {}),
    "qwen3": (hf.Qwen3ForCausalLM, hf.Qwen3Config, {}),
}


def loud(kind="llama"):
    model_class, config, choices = KINDS[kind]
    model = tiny._seeded(model_class, config(**{**tiny._DECODER, **choices}))
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.mul_(tiny.LOUD) if parameter.ndim == 2 else parameter.add_(torch.rand_like(parameter))
    return model


def batches():
    return [{"input_ids": tiny.tokens()}]


def logits(model):
    with torch.no_grad():
        return model(input_ids=tiny.tokens()).logits


def apart(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.mark.parametrize("given", [None, batches()], ids=["weights", "data"])
def test_a_saved_model_loads_bit_for_bit(kind, given, tmp_path):
    model = quantize_model(loud(kind), CONFIG, given)
    found = logits(model)
    assert apart(found, logits(loud(kind))) < 0.5
    model.save_pretrained(tmp_path)
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), found)
    layers = [module for module in again.modules() if isinstance(module, SVDQIntegerLinear)]
    assert len(layers) == 14
    assert {key: tensor.dtype for key, tensor in again.state_dict().items()} == {
        key: tensor.dtype for key, tensor in model.state_dict().items()
    }


def test_the_config_says_what_layers_do_with_their_inputs(tmp_path):
    model = quantize_model(loud(), CONFIG)
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["tie_word_embeddings"] is False
    assert stored["quantization_config"]["format_version"] == 5
    assert stored["quantization_config"]["layer_inputs"] == {
        "self_attn.o_proj": 4,
        "mlp.down_proj": "hadamard",
    }
    with safe_open(tmp_path / "model.safetensors", "pt") as opened:
        assert "model.layers.0.self_attn.o_proj.subspace_weight" in opened.keys()  # noqa: SIM118
        assert "model.layers.0.mlp.down_proj.subspace_weight" not in opened.keys()  # noqa: SIM118


def test_dequantizing_gives_a_dense_model_of_the_same_weights():
    model = quantize_model(loud(), CONFIG.replace(activations=8), batches())
    found = logits(model)
    dense = dequantize_model(model)
    assert not any(isinstance(module, SVDQIntegerLinear) for module in dense.modules())
    assert apart(logits(dense), found) < 0.05  # what rounding activations to 8 bits costs


def test_the_footprint_is_that_of_the_file(tmp_path):
    model = quantize_model(loud(), CONFIG)
    model.save_pretrained(tmp_path)
    assert read_footprint(tmp_path) == footprint(model)
    assert model.num_parameters() == loud().num_parameters() + model.lm_head.weight.numel()


def test_layers_kept_dense_are_rotated_with_the_rest():
    config = CONFIG.replace(modules_to_not_convert=["down_proj", "layers.1"])
    model = quantize_model(loud(), config, batches())
    assert sum(isinstance(module, SVDQIntegerLinear) for module in model.modules()) == 6
    assert apart(logits(model), logits(loud())) < 0.2


def test_error_feedback_lowers_the_error_of_the_outputs():
    torch.manual_seed(0)
    given = [{"input_ids": torch.randint(0, 96, (8, 32))} for _ in range(4)]
    errors = []
    for feedback in (False, True):
        model = quantize_model(loud(), CONFIG.replace(activations=8, error_feedback=feedback), given)
        with torch.no_grad():
            exact, found = (one(**given[0]).logits for one in (loud(), model))
        errors.append(apart(found, exact))
    assert errors[1] < errors[0]


def test_bases_hold_more_of_the_data_than_the_largest_channels_or_chance():
    model = loud()
    stream = find_stream(model)
    fold_norms(model, stream)
    seen = seen_covariances(model, stream, batches())
    kept = {}
    for name, covariances in {"data": seen, "weights": weight_covariances(model, stream)}.items():
        last = bases_of(covariances, 1 / 8, seed=0).stream[:, -8:]
        kept[name] = float((last.T @ seen.stream.double() @ last).trace() / seen.stream.double().trace())
    channels = float(seen.stream.diagonal().topk(8).values.sum() / seen.stream.trace())
    assert kept["data"] > channels
    assert kept["data"] > kept["weights"]


# What cannot be done, in one line each.


def test_a_model_that_cannot_be_rotated_is_refused_unchanged():
    model = tiny.FAMILIES["gemma3"].build()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(NotRotatable, match="post_attention_layernorm normalizes the output of"):
        quantize_model(model, CONFIG)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_weight_that_is_not_finite_is_refused_before_anything_is_rotated():
    model = loud()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    before = model.model.layers[0].mlp.up_proj.weight.clone()
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj"):
        quantize_model(model, CONFIG)
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, before)


def poisoned(name):
    model = loud("qwen2")
    with torch.no_grad():
        model.get_parameter(name).view(-1)[3] = torch.inf
    return model


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
        "model.layers.1.self_attn.v_proj.bias",
    ],
)
def test_any_parameter_that_is_not_finite_is_refused_by_its_name(name):
    model = poisoned(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"^{name} has a NaN or an infinity"):
        quantize_model(model, CONFIG)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_heads_that_a_subspace_would_fill_are_refused_before_anything_is_rotated():
    sizes = {**tiny._DECODER, "head_dim": 8, "num_attention_heads": 8}
    model = tiny._seeded(hf.LlamaForCausalLM, hf.LlamaConfig(**sizes))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.o_proj: a subspace=0\.125 of 8 columns"):
        quantize_model(model, CONFIG)
    with pytest.raises(ValueError, match=r"v_proj: a subspace=0\.125 of 8 columns .* take subspace=0"):
        quantize_model(model, CONFIG.replace(modules_to_not_convert=["o_proj"]))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("choices", "given", "reason"),
    [
        ({"layer_inputs": {"o_proj": 4}}, None, "layer_inputs=.*leave it out"),
        ({"basis": "weights"}, batches(), "basis='weights' needs no data: leave the batches out"),
    ],
)
def test_what_would_not_be_read_is_refused(choices, given, reason):
    with pytest.raises(ValueError, match=reason):
        quantize_model(loud(), CONFIG.replace(**choices), given)


def test_only_layers_that_are_quantized_are_named(tmp_path):
    model = quantize_model(loud(), CONFIG.replace(modules_to_not_convert=["down_proj"]))
    assert model.config.quantization_config.layer_inputs == {"self_attn.o_proj": 4}
    found = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(hf.AutoModelForCausalLM.from_pretrained(tmp_path)), found)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    quantize_model(loud(), CONFIG).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [
        ({"attn.o_proj": 4}, "layer_inputs names 'attn.o_proj', which ends the name of no layer"),
        ({"self_attn.o_proj": 3}, r"layers\.0\.self_attn\.o_proj: heads=3 does not divide the 64 columns"),
        ({"self_attn.o_proj": 8}, r"layers\.0\.self_attn\.o_proj: a subspace=0\.125 of 8 columns"),
    ],
)
def test_a_file_whose_config_names_what_no_layer_has_is_refused(inputs, reason, saved, tmp_path):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["layer_inputs"] |= inputs
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=reason):
        hf.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_quantizing_while_loading_is_refused_with_the_remedy(tmp_path):
    loud().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"activations=4 rotates the whole model.*quantize_model"):
        hf.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=CONFIG)


def test_a_folder_is_quantized_in_memory(tmp_path, caplog):
    loud().save_pretrained(tmp_path / "dense")
    caplog.set_level("WARNING")
    quantize_checkpoint(tmp_path / "dense", tmp_path / "out", CONFIG)
    assert "quantized in memory, not streamed: for integer activations it is rotated" in caplog.text
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(again), logits(quantize_model(loud(), CONFIG)))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "activations" in card


def test_adapters_are_refused():
    model = quantize_model(loud(), CONFIG)
    assert not model.hf_quantizer.is_trainable
    with pytest.raises(ValueError, match="rounds its activations has no gradient"):
        get_peft_model(model, LoraConfig(target_modules=["q_proj"]))


def test_a_file_without_a_subspace_that_its_config_has_is_refused(tmp_path):
    model = quantize_model(loud(), CONFIG.replace(subspace=0.0))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["subspace"] = 0.125
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"where the config says|is missing"):
        hf.AutoModelForCausalLM.from_pretrained(tmp_path)
