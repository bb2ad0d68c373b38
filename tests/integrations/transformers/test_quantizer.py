"""What a user does with a quantized model: load, save, train, copy, compile, generate, move, undo."""

import copy
import gc
import io
import json
import pickle

import pytest
import tiny_models as tiny
import torch
import transformers as hf
from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from transformers.utils import logging as hf_logging

from svdq_hf import (
    SVDQConfig,
    SVDQLinear,
    dequantize_model,
    footprint,
    quantize_model,
    read_footprint,
    register_saliency,
)
from svdq_hf.core import saliency
from svdq_hf.nn.inventory import svdq_layers

pytestmark = pytest.mark.oldest

CONFIG = SVDQConfig(k=32)


@pytest.fixture(scope="module")
def dense_folder(tmp_path_factory):
    """A dense BERT on disk."""
    folder = tmp_path_factory.mktemp("dense")
    tiny.FAMILIES["bert"].loud_model().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def quantized_folder(dense_folder, tmp_path_factory):
    """The same BERT, quantized."""
    folder = tmp_path_factory.mktemp("quantized")
    load(dense_folder).save_pretrained(folder)
    return folder


@pytest.fixture
def quantized(dense_folder):
    return load(dense_folder)


def load(folder, quantization=CONFIG, **choices):
    return hf.BertModel.from_pretrained(folder, quantization_config=quantization, **choices)


def output(model):
    return tiny.outputs(model, tiny.text())


def assert_same(one, other):
    assert tiny.different_tensors(one, other) == []
    assert torch.equal(output(one), output(other))


def assert_comes_back(model, folder):
    """Saved and loaded again, the model is the same."""
    model.save_pretrained(folder)
    reloaded, info = type(model).from_pretrained(folder, output_loading_info=True)
    assert tiny.problems(info) == {}
    assert_same(reloaded, model)


# Asking for it.


def test_a_plain_dict_asks_for_the_same(dense_folder, quantized):
    asked = {"quant_method": "svdq", "k": 32}
    assert_same(load(dense_folder, asked), quantized)
    assert asked == {"quant_method": "svdq", "k": 32}


def test_a_state_dict_in_memory_can_be_quantized(dense_folder, quantized):
    dense = hf.BertModel.from_pretrained(dense_folder)
    model = load(None, config=dense.config, state_dict=dense.state_dict())
    assert_same(model, quantized)


def test_a_bfloat16_checkpoint_keeps_its_own_values(dense_folder, tmp_path):
    hf.BertModel.from_pretrained(dense_folder, dtype=torch.bfloat16).save_pretrained(tmp_path)
    source, model = hf.BertModel.from_pretrained(tmp_path), load(tmp_path)
    assert model.dtype == torch.bfloat16
    for name, layer in svdq_layers(model):
        weight = source.get_submodule(name).weight
        kept = weight[layer.salient_rows.long(), layer.salient_columns.long()]
        assert torch.equal(layer.salient_values, kept.float()), name


@pytest.mark.parametrize(
    ("pattern", "dense"),
    [
        ("encoder.layer.0", 6),
        (r"encoder\.layer\.\d+\.intermediate", 2),
        ("output.dense", 4),
        ("pooler", 1),
    ],
    ids=["start", "regex", "suffix", "module"],
)
def test_layers_that_the_user_names_stay_dense(dense_folder, tmp_path, pattern, dense):
    model = load(dense_folder, SVDQConfig(k=32, modules_to_not_convert=[pattern]))
    assert sum(tiny.short_names(model, nn.Linear).values()) == dense
    assert sum(tiny.short_names(model).values()) == 13 - dense
    assert_comes_back(model, tmp_path)


def test_naming_layers_does_not_give_up_the_output_head():
    model = quantize_model(tiny.llama(), SVDQConfig(k=32, modules_to_not_convert=["down_proj"]))
    assert tiny.short_names(model, nn.Linear) == {"mlp.down_proj": 2, "lm_head": 1}


def test_a_name_that_matches_nothing_is_said(dense_folder, caplog):
    load(dense_folder, SVDQConfig(k=32, modules_to_not_convert=["pooler", "down_proj"]))
    assert caplog.messages == ["modules_to_not_convert: 'down_proj' matches no linear layer of this model"]


def test_a_name_of_the_base_model_holds_under_a_head(dense_folder, tmp_path):
    base = load(dense_folder, SVDQConfig(k=32, modules_to_not_convert=["encoder.layer.0"]))
    base.save_pretrained(tmp_path)
    with_head = hf.BertForSequenceClassification.from_pretrained(tmp_path)
    assert tiny.different_tensors(with_head.bert, base) == []


def test_a_file_for_another_head_gives_a_dense_pooler_to_train(tmp_path):
    source = quantize_model(hf.BertForMaskedLM(tiny.bert_config()), CONFIG)  # it has no pooler
    source.save_pretrained(tmp_path)
    model = hf.BertModel.from_pretrained(tmp_path)
    assert type(model.pooler.dense) is nn.Linear
    assert tiny.different_tensors(model.encoder, source.bert.encoder) == []
    assert 0.01 < model.pooler.dense.weight.std() < 0.03  # BERT's own initialisation: 0.02


# Choices. Every one of them is saved and comes back.

WEIGHTS = {"query": 64 * 64, "intermediate": 96 * 64, "output": 64 * 96}
CHOICES = {
    "k=0": (SVDQConfig(k=0), {"query": 0, "intermediate": 0, "output": 0}, (64, 3)),
    "k=1%": (SVDQConfig(k=0.01), {"query": 41, "intermediate": 61, "output": 61}, (64, 3)),
    "k=tiny-share": (SVDQConfig(k=1e-6), {"query": 0, "intermediate": 0, "output": 0}, (64, 3)),
    "k=5000": (SVDQConfig(k=5000), {"query": 4096, "intermediate": 5000, "output": 5000}, (64, 3)),
    "k=everything": (SVDQConfig(k=10**6), WEIGHTS, (64, 3)),
    "group=8": (SVDQConfig(k=32, group_size=8), None, (64, 12)),
    "group=32": (SVDQConfig(k=32, group_size=32), None, (64, 3)),
    "group=128": (SVDQConfig(k=32, group_size=128), None, (64, 1)),
    "group=row": (SVDQConfig(k=32, group_size="row"), None, (64, 1)),
    "group=tensor": (SVDQConfig(k=32, group_size="tensor"), None, (1, 1)),
    "paper": (SVDQConfig.paper(k=32), None, (1, 1)),
    "absmax": (SVDQConfig(k=32, scale="absmax"), None, (64, 3)),
    "sigma": (SVDQConfig(k=32, scale="sigma", clip_sigma=3.0), None, (64, 3)),
    "rank=2": (SVDQConfig(k=32, rank=2), None, (64, 3)),
    "magnitude": (SVDQConfig(k=32, saliency="magnitude"), None, (64, 3)),
    "relative": (SVDQConfig(k=32, saliency="relative"), None, (64, 3)),
    "random": (SVDQConfig(k=32, saliency="random", seed=3), None, (64, 3)),
    "compute=bfloat16": (SVDQConfig(k=32, compute_dtype="bfloat16"), None, (64, 3)),
    "bits=8": (SVDQConfig(k=32, bits=8), None, (64, 3)),
    "bits=3": (SVDQConfig(k=32, bits=3), None, (64, 3)),
    "bits=3, linear, rows": (SVDQConfig(k=32, bits=3, levels="linear", group_size="row"), None, (64, 1)),
}


@pytest.fixture(params=CHOICES)
def choice(request):
    return CHOICES[request.param]


def test_a_choice_is_stored_as_asked_and_comes_back(choice, dense_folder, tmp_path):
    config, counts, scale_shape = choice
    model = load(dense_folder, config)
    layer = model.encoder.layer[0]
    chosen = {
        "query": layer.attention.self.query,
        "intermediate": layer.intermediate.dense,
        "output": layer.output.dense,
    }
    assert {name: part.salient_values.numel() for name, part in chosen.items()} == (
        counts or {"query": 32, "intermediate": 32, "output": 32}
    )
    assert tuple(layer.output.dense.weight_scale.shape) == scale_shape
    assert_comes_back(model, tmp_path)
    assert hf.AutoConfig.from_pretrained(tmp_path).quantization_config == config.to_dict()


def test_a_choice_gives_the_same_in_memory(choice, dense_folder):
    config, _, _ = choice
    in_memory = quantize_model(hf.BertModel.from_pretrained(dense_folder), config)
    assert_same(in_memory, load(dense_folder, config))


def test_a_choice_stays_close_to_the_dense_model(choice, dense_folder):
    dense = output(hf.BertModel.from_pretrained(dense_folder))
    # Measured: 0.992 for the paper's choice, 0.997 and more for the others; without its layers 0.87.
    least = {3: 0.95, 4: 0.99, 8: 0.9999}[choice[0].bits]
    assert tiny.cosine(output(load(dense_folder, choice[0])), dense) > least


def test_when_every_weight_is_salient_nothing_is_lost(dense_folder):
    dense, model = hf.BertModel.from_pretrained(dense_folder), load(dense_folder, SVDQConfig(k=10**6))
    for name, layer in svdq_layers(model):
        assert torch.equal(layer.dequantize(), dense.get_submodule(name).weight), name
        assert layer.facts["relative_error"] == 0


@pytest.fixture
def first_column():
    """A user's own score, known for the length of a test."""

    @register_saliency("first_column")
    def score(weight, *, seed):
        return (torch.arange(weight.shape[1]) == seed).float().expand_as(weight)

    yield "first_column"
    saliency._SCORES.pop("first_column", None)


def test_a_users_own_score_picks_the_weights(dense_folder, first_column):
    model = load(dense_folder, SVDQConfig(k=64, saliency=first_column, seed=5))
    layer = model.encoder.layer[1].attention.self.key
    assert layer.salient_columns.tolist() == [5] * 64
    assert layer.salient_rows.tolist() == list(range(64))


def test_a_model_loads_and_is_saved_where_its_score_is_unknown(dense_folder, first_column, tmp_path):
    model = load(dense_folder, SVDQConfig(k=64, saliency=first_column))
    model.save_pretrained(tmp_path / "one")
    saliency._SCORES.pop(first_column)
    reloaded = hf.BertModel.from_pretrained(tmp_path / "one")
    assert_same(reloaded, model)
    assert_comes_back(reloaded, tmp_path / "two")


# In memory, and any module.


def sequential():
    return nn.Sequential(nn.Linear(70, 96), nn.GELU(), nn.LayerNorm(96), nn.Linear(96, 16, bias=False))


def test_any_module_is_quantized_in_place():
    x, model = torch.randn(5, 70), sequential()
    with torch.no_grad():
        expected, norm = model(x), model[2]
        assert quantize_model(model, CONFIG) is model
        assert [type(layer) for layer in model] == [SVDQLinear, nn.GELU, nn.LayerNorm, SVDQLinear]
        assert model[2] is norm
        assert model[3].bias is None
        assert tiny.cosine(model(x).flatten(), expected.flatten()) > 0.99  # 0.996 measured


def test_any_module_comes_back_through_its_state_dict():
    x, model, other = torch.randn(5, 70), sequential(), sequential()
    quantize_model(model, CONFIG)
    quantize_model(other, CONFIG).load_state_dict(model.state_dict())
    assert tiny.different_tensors(other, model) == []
    assert torch.equal(other(x), model(x))


def test_any_module_is_dequantized_in_place():
    x, model = torch.randn(5, 70), quantize_model(sequential(), CONFIG)
    with torch.no_grad():
        expected = model(x)
        assert dequantize_model(model) is model
        assert [type(layer) for layer in model] == [nn.Linear, nn.GELU, nn.LayerNorm, nn.Linear]
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)  # float32, other order


def test_a_module_that_is_used_twice_stays_one_module():
    shared = nn.Linear(64, 64)
    model = quantize_model(nn.Sequential(shared, nn.ReLU(), shared, nn.Linear(64, 64)), CONFIG)
    assert model[0] is model[2]
    assert type(model[3]) is SVDQLinear


def test_a_layer_may_be_followed_by_a_change_in_place():
    model = quantize_model(nn.Sequential(nn.Linear(64, 64), nn.ReLU(inplace=True)), CONFIG)
    x = torch.randn(2, 3, 64)
    assert torch.equal(model(x), model[0](x).relu())


def test_training_mode_frozen_biases_and_names_are_kept():
    model = sequential().eval()
    model[0].bias.requires_grad_(False)
    quantize_model(model, CONFIG)
    assert not model[0].training
    assert not model[0].bias.requires_grad
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        "0.salient_values",
        "2.weight",
        "2.bias",
        "3.salient_values",
    ]


def test_dequantize_model_undoes_a_transformers_model(quantized, tmp_path):
    expected = output(quantized)
    assert dequantize_model(quantized) is quantized
    torch.testing.assert_close(output(quantized), expected, rtol=1e-4, atol=1e-5)  # float32, other order
    assert tiny.short_names(quantized) == {}
    assert not quantized.is_quantized
    quantized.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


def test_dequantizing_after_a_save_works_as_before_it(dense_folder, tmp_path):
    one, other = load(dense_folder), load(dense_folder)
    other.save_pretrained(tmp_path)  # this turns config.dtype into a string
    assert tiny.different_tensors(one.dequantize(), other.dequantize()) == []


def test_dequantizing_into_a_given_dtype(quantized):
    weight = quantized.pooler.dense.dequantize()
    dequantize_model(quantized, torch.bfloat16)
    assert {t.dtype for t in quantized.parameters()} == {torch.bfloat16}
    assert torch.equal(quantized.pooler.dense.weight, weight.bfloat16())


def test_a_dequantized_model_can_be_quantized_again(quantized, tmp_path):
    again = quantize_model(quantized.dequantize(), SVDQConfig(k=16))
    assert again.pooler.dense.salient_values.shape == (16,)
    assert_comes_back(again, tmp_path)


@pytest.mark.parametrize("way", ["from_pretrained", "quantize_model"])
def test_a_config_that_is_changed_later_changes_no_model(way, dense_folder, tmp_path):
    config = SVDQConfig(k=32)
    if way == "quantize_model":
        model = quantize_model(hf.BertModel.from_pretrained(dense_folder), config)
    else:
        model = load(dense_folder, config)
    config.update(k=16)
    assert_comes_back(model, tmp_path)


# The file and what is known of it.


def test_config_json_holds_every_choice(quantized_folder):
    stored = json.loads((quantized_folder / "config.json").read_text())["quantization_config"]
    assert stored == CONFIG.to_dict()
    assert stored["quant_method"] == "svdq"
    assert stored["format_version"] == 2
    assert "svdq_hf" in stored["requires"]


def test_the_config_of_a_saved_model_is_still_json(quantized, tmp_path):
    quantized.save_pretrained(tmp_path)
    assert json.loads(quantized.config.to_json_string())["quantization_config"] == CONFIG.to_dict()
    reloaded = hf.BertModel.from_pretrained(tmp_path)
    assert reloaded.config.quantization_config == CONFIG
    assert json.loads(reloaded.config.to_json_string())["quantization_config"] == CONFIG.to_dict()


def test_a_quantized_file_keeps_its_own_config(quantized_folder, quantized):
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        reloaded = load(quantized_folder, SVDQConfig(k=3))
    assert reloaded.config.quantization_config == CONFIG
    assert_same(reloaded, quantized)


def test_without_this_package_the_file_is_refused_not_misread(quantized_folder, monkeypatch):
    monkeypatch.delitem(AUTO_QUANTIZATION_CONFIG_MAPPING, "svdq")
    with pytest.raises(RuntimeError, match="mismatch"):
        hf.BertModel.from_pretrained(quantized_folder)


@pytest.mark.parametrize("family", ["bert", "gpt2", "vit", "t5", "llama-tied"])
def test_memory_and_folder_have_the_same_footprint(family, tmp_path):
    model = quantize_model(tiny.FAMILIES[family].build(), CONFIG)
    model.save_pretrained(tmp_path)
    ours, stored = footprint(model), read_footprint(tmp_path)
    assert stored.total_bytes == ours.total_bytes == sum(t.nbytes for t in unique_tensors(model))
    assert stored.bits_per_weight == ours.bits_per_weight
    assert sorted(map(measures, stored.layers)) == sorted(map(measures, ours.layers))
    if family != "vit":  # whose file has other names than the model
        assert stored == ours


def unique_tensors(model):
    return {id(t): t for t in model.state_dict(keep_vars=True).values()}.values()


def measures(layer):
    return layer.out, layer.in_features, layer.k, layer.stored_bytes, sorted(layer.facts.items())


def test_a_file_that_joins_layers_has_a_footprint(tmp_path):
    model = quantize_model(tiny.dinov2(), CONFIG)
    model.save_pretrained(tmp_path)
    assert read_footprint(tmp_path).bits_per_weight == footprint(model).bits_per_weight


def test_a_weight_costs_four_and_a_quarter_bits_and_its_salient_ones(quantized):
    for layer in footprint(quantized).layers:
        if layer.in_features % 64 == 0:
            out, columns = layer.out, layer.in_features
            # 4 bits, 8 bits of scale for 32 weights, 16 for each row and column, 16 levels of 8;
            # and a salient weight's value, row and column: 32 bits each.
            once = 16 * (out + columns) + 16 * 8 + 96 * 32
            assert layer.bits_per_weight == pytest.approx(4.25 + once / (out * columns))


def facts(model):
    return {name: layer.facts for name, layer in svdq_layers(model)}


@pytest.mark.parametrize("family", ["bert", "gpt2", "vit"])
@pytest.mark.parametrize("shard", ["50GB", "20KB"], ids=["one-file", "shards"])
def test_facts_survive_saving_twice(family, shard, tmp_path):
    model = quantize_model(tiny.FAMILIES[family].build(), CONFIG)
    for layer in facts(model).values():
        assert layer.keys() == {"relative_error", "sigma_ratio"}
        assert 0 < layer["relative_error"] < 0.1
        assert 0.9 < layer["sigma_ratio"] < 1  # a random matrix has no structure
    copies = [model]
    for name in ("one", "two"):
        copies[-1].save_pretrained(tmp_path / name, max_shard_size=shard)
        copies.append(type(model).from_pretrained(tmp_path / name))
    assert facts(copies[1]) == facts(copies[2]) == facts(model)


# Training.


@pytest.fixture
def trainer(tmp_path):
    model = quantize_model(tiny.classifier(), CONFIG)
    data = [{"input_ids": row, "labels": row.sum() % 3} for row in tiny.tokens(12)]
    choices = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no", "seed": 1}
    args = hf.TrainingArguments(
        tmp_path, max_steps=4, per_device_train_batch_size=4, learning_rate=1e-2, **choices
    )
    return hf.Trainer(model=model, args=args, train_dataset=data, eval_dataset=data)


def test_trainer_evaluates_a_quantized_model(trainer):
    labels = torch.stack([row["labels"] for row in trainer.eval_dataset])
    with torch.no_grad():
        inputs = torch.stack([row["input_ids"] for row in trainer.eval_dataset])
        expected = trainer.model.eval()(inputs, labels=labels).loss
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(expected), rel=1e-5)


def test_trainer_changes_salient_weights_and_biases_and_no_code(trainer, tmp_path):
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    loss = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.model.state_dict()
    parts = {f"{name}.{part}" for name, layer in svdq_layers(trainer.model) for part in layer.parts()}
    changed = {name for name in parts if not torch.equal(after[name], before[name])}
    assert changed == {name for name in parts if name.endswith("salient_values")}
    assert not torch.equal(after["classifier.weight"], before["classifier.weight"])
    assert trainer.evaluate()["eval_loss"] < loss
    trainer.save_model(tmp_path / "trained")
    reloaded = hf.BertForSequenceClassification.from_pretrained(tmp_path / "trained")
    assert tiny.different_tensors(reloaded, trainer.model) == []


def test_after_loading_salient_weights_can_be_trained_and_codes_cannot(quantized_folder):
    model = hf.BertModel.from_pretrained(quantized_folder)
    for name, layer in svdq_layers(model):
        wants = {part: tensor.requires_grad for part, tensor in layer.named_parameters()}
        assert wants == {"weight": False, "salient_values": True, "bias": True}, name


def test_gradient_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        model = quantize_model(tiny.llama(), CONFIG).train()
        if checkpointing:  # as transformers 5.23 calls it, and as it was called before
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        model(tiny.tokens(), labels=tiny.tokens()).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert len(gradients[0]) == 14 + 5 + 2  # layers, norms, embeddings and head
    for name, gradient in gradients[0].items():
        assert gradient.abs().sum() > 0, name
        torch.testing.assert_close(gradients[1][name], gradient)


# Copies, casts, graphs.


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


def through_torch_save(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("way", [copy.deepcopy, through_pickle, through_torch_save])
def test_a_copy_is_the_same_model_and_shares_nothing(way, quantized, tmp_path):
    twin = way(quantized)
    assert_same(twin, quantized)
    assert facts(twin) == facts(quantized)
    twin.pooler.dense.salient_values.data.zero_()
    assert quantized.pooler.dense.salient_values.abs().sum() > 0
    assert_comes_back(twin, tmp_path)


def test_a_cast_leaves_what_is_stored_as_it_is(quantized):
    before = copy.deepcopy(quantized)
    quantized.to(torch.bfloat16)
    parts = {f"{name}.{part}" for name, layer in svdq_layers(quantized) for part in layer.parts()}
    changed = tiny.different_tensors(quantized, before)
    assert not parts & set(changed)
    dtypes = {name: tensor.dtype for name, tensor in quantized.state_dict().items() if name not in parts}
    assert {name for name, dtype in dtypes.items() if dtype == torch.bfloat16} == set(changed)
    assert tiny.cosine(output(quantized), output(before)) > 0.999  # bfloat16: 2**-9 in each step


def test_a_compiled_model_is_one_graph_and_gives_the_same():
    model, ids = quantize_model(tiny.llama(), CONFIG), tiny.tokens()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(ids).logits, model(ids).logits)


def test_an_exported_model_gives_the_same(quantized):
    ids = tiny.tokens()
    program = torch.export.export(quantized, (), {"input_ids": ids})
    targets = [str(node.target) for node in program.graph.nodes]
    assert targets.count("svdq.linear.default") == 13
    with torch.no_grad():
        assert torch.equal(program.module()(input_ids=ids)[0], quantized(ids)[0])


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generating_equals_choosing_the_best_token_step_by_step(cache):
    model, ids = quantize_model(tiny.FAMILIES["llama-untied"].loud_model(), CONFIG), tiny.tokens()
    generated = model.generate(
        ids, max_new_tokens=5, do_sample=False, eos_token_id=None, cache_implementation=cache
    )
    for _ in range(5):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(generated, ids)


# Devices.


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}], ids=["auto", "name", "dict"])
def test_a_device_map_gives_the_same_model(device_map, dense_folder, quantized_folder, quantized):
    expected = torch.device("cuda", 0) if device_map == "auto" and torch.cuda.is_available() else "cpu"
    on_the_fly = load(dense_folder, device_map=device_map)
    stored = hf.BertModel.from_pretrained(quantized_folder, device_map=device_map)
    for model in (on_the_fly, stored):
        assert model.device == torch.device(expected)
        assert tiny.different_tensors(model.cpu(), quantized) == []


PARTLY_ON_DISK = {"embeddings": "cpu", "encoder.layer.0": "cpu", "encoder.layer.1": "disk", "pooler": "cpu"}


def test_quantizing_what_goes_to_disk_is_refused(dense_folder, tmp_path):
    with pytest.raises(ValueError, match=r"\['encoder.layer.1'\] on disk.*save_pretrained\(\)"):
        load(dense_folder, device_map=PARTLY_ON_DISK, offload_folder=tmp_path)


@pytest.mark.parametrize("buffers", [False, True], ids=["parameters", "and-buffers"])
def test_a_quantized_model_runs_from_disk(buffers, quantized_folder, quantized, tmp_path):
    offloaded = hf.BertModel.from_pretrained(
        quantized_folder, device_map=PARTLY_ON_DISK, offload_folder=tmp_path, offload_buffers=buffers
    )
    assert offloaded.encoder.layer[1].output.dense.weight.is_meta
    assert torch.equal(output(offloaded), output(quantized))


PLACES = {
    "gpt2": [f"transformer.{part}" for part in ("wte", "wpe", "h.0", "h.1", "ln_f")] + ["lm_head"],
    "clip": ["text_model", "vision_model", "text_projection", "visual_projection", "logit_scale"],
    "llama-untied": [f"model.{part}" for part in ("embed_tokens", "layers", "norm")] + ["lm_head"],
}


# CLIP's logit_scale is a parameter beside its modules: transformers asks for its place, accelerate wonders.
@pytest.mark.filterwarnings("ignore:The following device_map keys do not match any submodules")
@pytest.mark.parametrize(
    ("family", "on_disk"),
    [("gpt2", "transformer.h.1"), ("clip", "text_model"), ("llama-untied", "model.layers")],
)
def test_a_quantized_model_of_another_family_runs_from_disk(family, on_disk, tmp_path):
    model = quantize_model(tiny.FAMILIES[family].loud_model(), CONFIG)
    model.save_pretrained(tmp_path / "quantized")
    places = {place: "disk" if place == on_disk else "cpu" for place in PLACES[family]}
    offloaded = type(model).from_pretrained(
        tmp_path / "quantized", device_map=places, offload_folder=tmp_path / "offload"
    )
    inputs = tiny.FAMILIES[family].inputs()
    assert torch.equal(tiny.outputs(offloaded, inputs), tiny.outputs(model, inputs))


# transformers says so whenever an offloaded model is saved.
@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
def test_a_model_on_disk_is_saved_whole(quantized_folder, quantized, tmp_path):
    offloaded = hf.BertModel.from_pretrained(
        quantized_folder, device_map=PARTLY_ON_DISK, offload_folder=tmp_path / "offload"
    )
    offloaded.save_pretrained(tmp_path / "saved")
    assert_same(hf.BertModel.from_pretrained(tmp_path / "saved"), quantized)


def test_no_dense_copy_of_a_quantized_weight_stays_in_memory(tmp_path):
    shapes = {(104, 64), (64, 104)}  # of no other test
    tiny.bert(intermediate_size=104).save_pretrained(tmp_path)
    model = load(tmp_path)
    gc.collect()
    alive = [t for t in gc.get_objects() if type(t) in (torch.Tensor, nn.Parameter)]  # no fakes of others
    assert [t.dtype for t in alive if tuple(t.shape) in shapes] == []
    for name, layer in svdq_layers(model):
        wide = {part for part, t in layer.state_dict().items() if t.is_floating_point()}
        assert wide == {"row_scale", "column_scale", "salient_values", "bias"}, name


# What is said.


def test_a_dequantized_mixture_of_experts_is_saved_as_the_original_was(tmp_path):
    source = tiny.mixtral()
    source.save_pretrained(tmp_path / "dense")
    quantize_model(source, CONFIG).save_pretrained(tmp_path / "quantized")
    hf.MixtralForCausalLM.from_pretrained(tmp_path / "quantized").dequantize().save_pretrained(
        tmp_path / "back"
    )
    names = [set(safetensors_names(tmp_path / folder / "model.safetensors")) for folder in ("dense", "back")]
    assert names[0] == names[1]


def safetensors_names(file):
    content = file.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return [name for name in header if name != "__metadata__"]


@pytest.mark.parametrize("shown", [True, False], ids=["shown", "switched-off"])
def test_the_progress_bar_is_the_one_of_transformers(shown, capsys):
    assert hf_logging.is_progress_bar_enabled()
    try:
        if not shown:
            hf_logging.disable_progress_bar()
        dequantize_model(quantize_model(tiny.bert(), CONFIG))
    finally:
        hf_logging.enable_progress_bar()
    said = capsys.readouterr().err
    assert ("Quantizing" in said, "Dequantizing" in said) == (shown, shown)


# What a process or a caller may have set.


@pytest.fixture
def default_dtype():
    yield torch.set_default_dtype
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["svd", "random", "relative"])
def test_torchs_default_dtype_changes_nothing(name, dtype, default_dtype):
    torch.manual_seed(0)
    weight, x = torch.randn(320, 384), torch.randn(2, 384)
    found = []
    for choice in (torch.float32, dtype):
        default_dtype(choice)
        model = nn.Sequential(nn.Linear(384, 320, bias=False, dtype=torch.float32))
        model[0].weight.data = weight.clone()
        quantize_model(model, SVDQConfig(k=50, saliency=name))
        found.append((model[0].parts(), model(x)))
    assert all(torch.equal(found[0][0][part], found[1][0][part]) for part in found[0][0])
    assert torch.equal(found[0][1], found[1][1])


def test_autocast_has_the_output_in_its_own_dtype():
    model = quantize_model(nn.Sequential(nn.Linear(64, 32)), CONFIG)
    x = torch.randn(3, 64)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(x)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, model(x.bfloat16()))


def test_frozen_weight_stays_frozen():
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 64))
    model[0].requires_grad_(False)
    quantize_model(model, CONFIG)
    assert [layer.salient_values.requires_grad for layer in model] == [False, True]


def test_torchs_own_transformer_layers_stay_dense():
    """In evaluation their fast path reads the weights of its parts itself."""
    block = nn.TransformerEncoderLayer(64, 4, 64, batch_first=True)
    model = quantize_model(nn.Sequential(nn.Linear(64, 64), block).eval(), CONFIG)
    assert [name for name, _ in svdq_layers(model)] == ["0"]
    with torch.no_grad():
        assert torch.isfinite(model(torch.randn(1, 3, 64))).all()


def test_a_group_beyond_the_layer_is_the_row():
    wide = quantize_model(nn.Sequential(nn.Linear(96, 32)), SVDQConfig(k=0, group_size=64 * 10**6))
    torch.manual_seed(0)
    assert wide[0].weight_scale.shape == (32, 1)


def test_batches_that_nobody_asked_for_are_refused():
    with pytest.raises(ValueError, match="saliency 'svd' needs no data"):
        quantize_model(nn.Sequential(nn.Linear(64, 32)), CONFIG, [torch.zeros(1, 64)])


@pytest.mark.parametrize("config", [SVDQConfig, 256, "svd"], ids=["class", "k", "score"])
def test_config_that_is_none_is_named(config):
    with pytest.raises(ValueError, match=r"must be an SVDQConfig, such as SVDQConfig\(k=256\)"):
        quantize_model(nn.Sequential(nn.Linear(64, 32)), config)


def test_part_of_a_stored_model_loads_as_a_class_that_would_keep_it_dense(tmp_path):
    """What is quantized in a file is what the file says, whatever the class that reads it."""
    model = quantize_model(tiny.clip(), CONFIG)
    assert "text_projection" in dict(svdq_layers(model))
    model.save_pretrained(tmp_path)
    config = hf.CLIPConfig.from_pretrained(tmp_path).text_config
    config.quantization_config = CONFIG.to_dict()
    config.projection_dim = model.config.projection_dim
    part = hf.CLIPTextModelWithProjection.from_pretrained(tmp_path, config=config)
    assert torch.equal(part.text_projection.weight, model.text_projection.weight)
