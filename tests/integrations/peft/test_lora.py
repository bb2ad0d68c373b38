"""PEFT's LoRA on quantized models: found unasked, saved, loaded, merged or refused, begun from the error."""

import contextlib
import copy
import subprocess
import sys

import pytest
import tiny_models as tiny
import torch
import transformers as hf
from packaging.version import Version
from torch import nn
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.pytorch_utils import Conv1D

from svdq_hf import SVDQConfig, SVDQLinear, dequantize_model, mark_trainable, quantize_model
from svdq_hf.nn.inventory import svdq_layers

peft = pytest.importorskip("peft", reason="needs PEFT: pip install -e '.[peft]'")
from svdq_hf.integrations.peft.adapters import init_adapters_from_error, merge_adapters  # noqa: E402  # it imports PEFT
from svdq_hf.integrations.peft.lora import SVDQLoraLinear, adapted_layers  # noqa: E402

pytestmark = [
    pytest.mark.oldest,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing:FutureWarning"),  # PEFT's own
]
own_integration = pytest.mark.skipif(
    Version(peft.__version__) < Version(MIN_PEFT_VERSION),
    reason=f"transformers {hf.__version__} wants PEFT {MIN_PEFT_VERSION}, and this is {peft.__version__}",
)
CONFIG = SVDQConfig(k=32)


GATE = "model.layers.0.mlp.gate_proj.weight"


def gpt2():
    torch.manual_seed(0)
    return hf.GPT2LMHeadModel(
        hf.GPT2Config(
            vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=40, bos_token_id=1, eos_token_id=2
        )
    ).eval()


FAMILIES = {
    "classifier": (tiny.classifier, ["query", "value", "dense"], "SEQ_CLS"),
    "llama": (tiny.llama, "all-linear", "CAUSAL_LM"),
    "gpt2": (gpt2, ["c_attn", "c_proj", "c_fc"], "CAUSAL_LM"),
}


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def dense(family):
    return FAMILIES[family][0]()


def quantized(family, config=CONFIG):
    return quantize_model(dense(family), config).eval()


def lora_config(family, **choices):
    _, targets, task = FAMILIES[family]
    return peft.LoraConfig(**{"r": 4, "target_modules": targets, "task_type": task, **choices})


def adapted(family, *, trained=True, **choices):
    """A quantized model with adapters; trained: as if, with random numbers in B."""
    model = peft.get_peft_model(quantized(family), lora_config(family, **choices)).eval()
    torch.manual_seed(1)
    if trained:
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter.data.normal_(std=0.05)
    return model


def ids():
    return torch.arange(1, 15).reshape(2, 7)


@torch.no_grad()
def logits(model):
    return model(input_ids=ids()).logits


def stored(model):
    """What every quantized layer stores, as copies."""
    return [part.clone() for _, layer in svdq_layers(model) for part in layer.parts().values()]


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def assert_same(found, wanted):
    assert len(found) == len(wanted)
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


# Found with no call.


def test_fresh_adapters_change_no_bit_of_the_outputs(family):
    plain = logits(quantized(family))
    model = adapted(family, trained=False)
    assert torch.equal(logits(model), plain)
    assert len(list(adapted_layers(model))) >= 8


def test_disabled_adapters_are_the_base(family):
    model = adapted(family)
    plain = logits(quantized(family))
    assert not torch.equal(logits(model), plain)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)


def test_all_linear_is_what_it_is_for_a_dense_model(family):
    choices = {"target_modules": "all-linear", "fan_in_fan_out": family == "gpt2"}
    models = [
        peft.get_peft_model(model, lora_config(family, **choices))
        for model in (dense(family), quantized(family))
    ]
    names = [{n for n, _ in model.named_parameters() if "lora_" in n} for model in models]
    assert names[0] == names[1]


def test_all_linear_leaves_a_quantized_output_head_alone():
    model = quantize_model(tiny.llama(tie_word_embeddings=True), SVDQConfig(k=32, lm_head=True))
    model = peft.get_peft_model(model, lora_config("llama"))
    names = [name for name, _ in adapted_layers(model)]
    assert len(names) == 14
    assert not any("lm_head" in name for name in names)
    model.add_adapter("second", lora_config("llama"))  # no adapter on an adapter
    assert [name for name, _ in adapted_layers(model)] == names


@own_integration
def test_transformers_own_adapters_work():
    model = quantized("llama")
    plain = logits(model)
    model.add_adapter(lora_config("llama", init_lora_weights=False))
    assert not torch.equal(logits(model), plain)
    model.disable_adapters()
    assert torch.equal(logits(model), plain)


@pytest.mark.slow
@pytest.mark.parametrize("first", ["peft", "svdq_hf", "transformers"])
def test_the_order_of_imports_does_not_matter(first):
    code = f"import {first}\n" + (
        "import peft, svdq_hf, torch\n"
        "model = torch.nn.Sequential(torch.nn.Linear(64, 64))\n"
        "svdq_hf.quantize_model(model, svdq_hf.SVDQConfig(k=4))\n"
        "model = peft.get_peft_model(model, peft.LoraConfig(target_modules=['0']))\n"
        "print(type(model.base_model.model[0]).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "SVDQLoraLinear", done.stderr


# Trained, saved, loaded.


def test_only_adapters_train(family):
    model = adapted(family, lora_dropout=0.1).train()
    before = stored(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    labels = torch.tensor([0, 1]) if family == "classifier" else ids()
    model(input_ids=ids(), labels=labels).loss.backward()
    optimizer.step()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient
    assert all("lora_" in name or "modules_to_save" in name for name in with_gradient)
    assert_same(stored(model), before)


def test_loaded_into_a_fresh_quantized_base_outputs_are_equal_bit_for_bit(family, tmp_path):
    model = adapted(family)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(quantized(family), tmp_path)
    assert torch.equal(logits(again), logits(model))


def test_the_same_through_files_of_the_base(tmp_path):
    quantized("llama").save_pretrained(tmp_path / "base")
    base = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = peft.get_peft_model(base, lora_config("llama", init_lora_weights=False)).eval()
    model.save_pretrained(tmp_path / "adapter")
    again = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")  # it finds the base itself
    assert isinstance(again.base_model.model.model.layers[0].mlp.up_proj, SVDQLoraLinear)
    assert torch.equal(logits(again), logits(model))


def test_an_adapter_is_stored_as_for_a_dense_model(family, tmp_path):
    choices = {"fan_in_fan_out": family == "gpt2"}
    model = adapted(family, **choices)
    model.save_pretrained(tmp_path)
    on_dense = peft.PeftModel.from_pretrained(dense(family), tmp_path)
    same = peft.PeftModel.from_pretrained(dequantize_model(quantized(family)), tmp_path)
    torch.testing.assert_close(logits(same), logits(model))
    assert not torch.equal(logits(on_dense), logits(same))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"intermediate_size": 160}, r"lora_B of bert.encoder.layer.0.intermediate.dense is \[96, 4\]"),
        ({"num_hidden_layers": 1}, "it has weights for bert.encoder.layer.1"),
    ],
)
def test_an_adapter_for_another_base_is_an_error(change, told, tmp_path):
    adapted("classifier").save_pretrained(tmp_path)
    base = quantize_model(tiny.classifier(**change), CONFIG)
    before = stored(base)
    with pytest.raises(ValueError, match=f"trained for another base model: {told}"):
        peft.PeftModel.from_pretrained(base, tmp_path)
    assert_same(stored(base), before)


def test_of_layers_that_an_adapter_lacks_peft_warns(tmp_path):
    adapted("classifier").save_pretrained(tmp_path)
    base = quantize_model(tiny.classifier(num_hidden_layers=3), CONFIG)
    with pytest.warns(UserWarning, match=r"missing adapter keys.*encoder\.layer\.2"):
        peft.PeftModel.from_pretrained(base, tmp_path)


def test_two_adapters_on_one_base(tmp_path):
    model = adapted("llama")
    model.save_pretrained(tmp_path)
    model.add_adapter("second", lora_config("llama", init_lora_weights=False))
    first = logits(model)
    model.set_adapter("second")
    assert not torch.equal(logits(model), first)
    model.load_adapter(tmp_path, "third")
    model.set_adapter("third")
    assert torch.equal(logits(model), first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prepare_model_for_kbit_training_does_no_harm(dtype):
    model = quantize_model(tiny.llama().to(dtype), CONFIG).eval()
    before, plain = stored(model), logits(model)
    floats = {name for name, p in model.named_parameters() if p.dtype == dtype}
    assert peft.prepare_model_for_kbit_training(model) is model
    assert_same(stored(model), before)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert {p.dtype for name, p in model.named_parameters() if name in floats} == {torch.float32}
    if dtype == torch.float32:
        assert torch.equal(logits(model), plain)
    else:  # embeddings and norms are computed in FP32 now: 8 bits of a bfloat16 are the difference
        assert (logits(model) - plain).norm() < 2**-6 * plain.norm()
    trained = peft.get_peft_model(model, lora_config("llama"))
    trained(input_ids=ids(), labels=ids()).loss.backward()
    assert all(layer.lora_B["default"].weight.grad is not None for _, layer in adapted_layers(trained))


def test_salient_tuning_refuses_adapters():
    with pytest.raises(ValueError, match="has adapters"):
        mark_trainable(adapted("llama"))


@pytest.mark.parametrize(
    ("choice", "told"),
    [
        ({"use_dora": True}, "use_dora: on a quantized layer only plain LoRA works"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'.*init_adapters_from_error"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
    ],
)
def test_what_needs_the_dense_weight_is_refused(choice, told):
    with pytest.raises(ValueError, match=told):
        peft.get_peft_model(quantized("llama"), lora_config("llama", **choice))


# Merging.


@pytest.mark.parametrize("call", ["merge_and_unload", "merge_adapter"])
def test_merging_without_knowing_is_refused_and_loses_nothing(call, family):
    model = adapted(family)
    before, outputs = stored(model), logits(model)
    with pytest.raises(ValueError, match=r"rounds.*merge_adapters\(model\).*dequantize_model"):
        getattr(model, call)()
    assert_same(stored(model), before)
    assert torch.equal(logits(model), outputs)


def test_unloading_gives_the_base_back(family):
    model = adapted(family).unload()
    if family != "classifier":  # of which the head is replaced
        assert torch.equal(logits(model), logits(quantized(family)))
    assert all(type(layer) is SVDQLinear for _, layer in svdq_layers(model))


def test_merging_adds_to_the_dequantized_weight_and_quantizes_that(family):
    model = adapted(family)
    layers = dict(adapted_layers(model))
    sums = {name: layer.base_layer.dequantize() + layer.delta(["default"]) for name, layer in layers.items()}
    errors = {n: layer.base_layer.facts["relative_error"] for n, layer in layers.items()}
    before = logits(model)
    result = merge_adapters(model, {"input_ids": ids()})
    merged = dict(svdq_layers(result.model))
    for name, wanted in sums.items():
        layer = merged[name]
        at = layer.salient_rows.long(), layer.salient_columns.long()
        assert torch.equal(layer.salient_values, wanted[at])  # exact where it is salient
        lost = (layer.dequantize() - wanted).norm() / wanted.norm()
        assert lost < 1.2 * errors[name]  # quantized once more, no worse than the first time
        assert 0 < result.lost[name] < 2
    change = float((logits(result.model) - before).norm() / before.norm())
    assert result.output_change == pytest.approx(change)
    assert f"{change:.2%}" in str(result)
    assert not hasattr(result.model, "peft_config")


def test_a_merged_model_is_saved_and_loaded_as_any_other(tmp_path):
    result = merge_adapters(adapted("llama"))
    assert result.output_change is None
    result.model.save_pretrained(tmp_path)
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(result.model))


def test_a_layer_whose_adapter_is_zero_keeps_its_bits():
    model = adapted("llama", trained=False)
    before = stored(model)
    assert set(merge_adapters(model).lost.values()) == {0.0}
    assert_same(stored(model), before)


def test_an_adapter_with_a_nan_is_not_merged():
    model = adapted("llama")
    layer = dict(adapted_layers(model))["model.layers.1.mlp.down_proj"]
    layer.lora_A["default"].weight.data[0, 0] = float("nan")
    before = stored(model)
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.down_proj: the adapter has a NaN"):
        merge_adapters(model)
    assert_same(stored(model), before)


def test_merging_what_has_no_adapters_is_an_error():
    with pytest.raises(ValueError, match="get_peft_model"):
        merge_adapters(quantized("llama"))


def test_an_adapter_that_not_every_layer_has_is_merged():
    model = adapted("llama")
    model.add_adapter("few", peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    model.set_adapter("few")
    others = {name: stored(layer) for name, layer in adapted_layers(model) if "few" not in layer.lora_A}
    merged = merge_adapters(model).model
    for name, before in others.items():
        assert_same(stored(merged.get_submodule(name)), before)


@pytest.mark.parametrize(
    ("choices", "told"),
    [({"lora_bias": True}, "has a bias .lora_bias=True. and the layer has none"), ({}, "switched off")],
    ids=["bias", "disabled"],
)
def test_what_cannot_be_merged_is_named_before_anything_changes(choices, told):
    with pytest.warns() if choices else contextlib.nullcontext():  # PEFT's own, of the bias
        model = adapted("llama", **choices)
    before, answers = stored(model), logits(model)
    with (
        pytest.raises(ValueError, match=told),
        contextlib.nullcontext() if choices else model.disable_adapter(),
    ):
        merge_adapters(model)
    assert_same(stored(model), before)
    assert torch.equal(logits(model), answers)


@own_integration
def test_merging_adapters_of_transformers_own_integration_says_the_way():
    model = quantized("llama")
    model.add_adapter(lora_config("llama"))
    with pytest.raises(ValueError, match=r"merge PeftModel\.from_pretrained"):
        merge_adapters(model)


def test_the_change_of_outputs_is_told_for_one_tensor_too():
    changed = [
        merge_adapters(adapted("llama"), batch).output_change for batch in (ids(), {"input_ids": ids()})
    ]
    assert changed[0] == changed[1] > 0


def test_adapters_are_not_quantized():
    model = peft.get_peft_model(dense("llama"), lora_config("llama", r=8))
    with pytest.raises(ValueError, match="the model has adapters"):
        quantize_model(model, CONFIG)
    assert not list(svdq_layers(model))
    assert list(svdq_layers(quantize_model(model.merge_and_unload(), CONFIG)))


def test_inside_of_peft_a_model_is_made_dense_and_saved(tmp_path):
    model = adapted("llama")
    before, trains = logits(model), trainable(model)
    dequantize_model(model)
    assert trainable(model) == trains  # the base stays frozen
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(hf.AutoModelForCausalLM.from_pretrained(tmp_path)), before)


def test_a_base_that_is_still_inside_of_peft_is_not_saved(tmp_path):
    model = adapted("llama")
    with pytest.raises(ValueError, match=r"inside of a LoRA layer.*unload\(\)"):
        model.get_base_model().save_pretrained(tmp_path)
    base = model.unload()
    base.save_pretrained(tmp_path)
    assert torch.equal(logits(hf.AutoModelForCausalLM.from_pretrained(tmp_path)), logits(base))


@pytest.mark.parametrize(
    "choices", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [1, 2]}], ids=["head", "tokens"]
)
def test_what_is_packed_is_not_trained_whole(choices):
    model = quantized("llama", SVDQConfig(k=8, lm_head=True, embeddings=True))
    with pytest.raises(ValueError, match=f"{next(iter(choices))}: .* is quantized"):
        peft.get_peft_model(model, lora_config("llama", **choices))


def test_adapters_are_not_pushed_as_a_quantized_model():
    from svdq_hf.hub.push import push_model

    with pytest.raises(ValueError, match=r"the model has adapters.*merge_adapters"):
        push_model(adapted("llama"), "alice/adapter")


def test_a_start_needs_a_scaling():
    model = adapted("llama", trained=False, lora_alpha=0)
    with pytest.raises(ValueError, match="lora_alpha must be above 0"):
        init_adapters_from_error(model, dense("llama"))


def test_dequantized_first_peft_merges_exactly(family):
    model = adapted(family)
    before = logits(model)
    dequantize_model(model.get_base_model())
    torch.testing.assert_close(logits(model), before)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), before)
    kinds = {type(module) for module in merged.modules() if isinstance(module, nn.Linear | Conv1D)}
    assert kinds <= {nn.Linear, Conv1D}


# The start from the error.


def test_the_start_is_the_errors_best_of_its_rank(family):
    weights = dense(family)
    model = adapted(family, trained=False)
    before = stored(model)
    found = init_adapters_from_error(model, weights)
    assert_same(stored(model), before)
    for name, layer in adapted_layers(model):
        weight = weights.get_submodule(name).weight.detach()
        error = (weight.T if family == "gpt2" else weight) - layer.base_layer.dequantize()
        singular = torch.linalg.svdvals(error.double())
        left = (error - layer.delta(["default"])).norm()
        assert float(left) == pytest.approx(float(singular[4:].norm()), rel=1e-3)  # Eckart and Young
        size = float(weight.norm())
        assert found[name] == pytest.approx((float(error.norm()) / size, float(left) / size))


@pytest.mark.parametrize("kind", ["model", "state dict", "folder", "base model"])
def test_the_dense_model_may_be_given_in_four_ways(kind, tmp_path):
    weights = tiny.classifier()
    weights.save_pretrained(tmp_path)
    sources = {
        "model": weights,
        "state dict": weights.state_dict(),
        "folder": tmp_path,
        "base model": weights.bert,
    }
    found = init_adapters_from_error(adapted("classifier", trained=False), sources[kind])
    assert len(found) == 11
    assert all(after < before for before, after in found.values())


def test_the_start_brings_a_model_nearer_to_the_dense_one():
    weights = tiny.FAMILIES["llama"].loud_model() if "llama" in tiny.FAMILIES else tiny.llama()
    base = quantize_model(copy.deepcopy(weights), SVDQConfig.paper(k=0)).eval()
    model = peft.get_peft_model(base, peft.LoraConfig(r=16, target_modules="all-linear")).eval()
    error = [(model(input_ids=ids())[0] - weights(input_ids=ids())[0]).norm()]
    init_adapters_from_error(model, weights)
    error.append((model(input_ids=ids())[0] - weights(input_ids=ids())[0]).norm())
    assert error[1] < 0.9 * error[0]


def test_what_cannot_be_the_original_is_refused():
    model = adapted("llama", trained=False)
    fresh = [p.clone() for n, p in model.named_parameters() if "lora_" in n]
    weights = dense("llama")
    with pytest.raises(ValueError, match=r"no quantized layer.*'other'"):
        init_adapters_from_error(model, weights, adapter="other")
    with pytest.raises(ValueError, match="dense is quantized itself"):
        init_adapters_from_error(model, quantized("llama"))
    with pytest.raises(ValueError, match=r"layers.1.*has no weight"):
        init_adapters_from_error(
            model, {n: w for n, w in weights.state_dict().items() if "layers.1" not in n}
        )
    with pytest.raises(ValueError, match=r"gate_proj: the dense weight is \[128, 64\]"):
        init_adapters_from_error(model, {**weights.state_dict(), GATE: torch.zeros(128, 64)})
    for parameter in weights.parameters():
        parameter.data.neg_()
    with pytest.raises(ValueError, match="not the one that was quantized"):
        init_adapters_from_error(model, weights)
    assert_same([p for n, p in model.named_parameters() if "lora_" in n], fresh)
    with pytest.raises(ValueError, match="is not fresh"):
        init_adapters_from_error(adapted("llama"), dense("llama"))


def test_packed_experts_take_no_adapter():
    model = quantize_model(tiny.mixtral(), SVDQConfig(k=4))
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"])
    with pytest.raises(ValueError, match="adapters on packed experts"):
        peft.get_peft_model(model, config)
