"""Salient tuning: what trains, what stays, and that the saved model is a checkpoint as any other."""

import copy
import json

import pytest
import tiny_models as tiny
import torch
import transformers as hf
from safetensors.torch import load_file

from svdq_hf import SVDQConfig, mark_trainable, quantize_model
from svdq_hf.nn.inventory import svdq_layers
from svdq_hf.quantize.footprint import read_footprint

CONFIG = SVDQConfig(k=32)


@pytest.fixture
def model():
    return quantize_model(tiny.classifier(), CONFIG)


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def batch():
    return {"input_ids": torch.arange(1, 15).reshape(2, 7), "labels": torch.tensor([0, 2])}


def trainer(model, folder, **choices):
    arguments = hf.TrainingArguments(
        str(folder),
        max_steps=2,
        learning_rate=1e-2,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **choices,
    )
    examples = [{"input_ids": torch.randint(1, 90, (7,)), "labels": i % 3} for i in range(16)]
    return hf.Trainer(model, arguments, train_dataset=examples)


# What is marked.


def test_each_kind_is_what_its_name_says(model):
    kinds = {
        "salient": {f"{name}.salient_values" for name, _ in svdq_layers(model)},
        "biases": {
            name for name, _ in model.named_parameters() if name.startswith("bert") and name.endswith("bias")
        },
        "norms": {name for name, _ in model.named_parameters() if name.endswith("LayerNorm.weight")},
        "head": {"classifier.weight", "classifier.bias"},
    }
    for kind, names in kinds.items():
        assert names
        chosen = dict.fromkeys(kinds, False) | {kind: True}
        result = mark_trainable(model, **chosen)
        assert trainable(model) == names
        assert result.counts == {kind: sum(model.get_parameter(name).numel() for name in names)}
    mark_trainable(model)
    assert trainable(model) == set().union(*kinds.values())


def test_the_counts_are_those_of_the_dense_model(model):
    dense = sum(parameter.numel() for parameter in tiny.classifier().parameters())
    result = mark_trainable(model)
    assert result.total + result.frozen == dense
    assert result.share == result.total / dense
    assert result.total == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_it_prints_what_trains(model, capsys):
    result = mark_trainable(model)
    printed = capsys.readouterr().out
    for kind, count in {**result.counts, "in all": result.total, "frozen": result.frozen}.items():
        assert any(kind in line and f"{count:,}" in line for line in printed.splitlines())
    assert f"salient {32 * 13:,}" in str(result)  # 6 layers in each of two, and the pooler
    assert mark_trainable(model, show=False) == result
    assert capsys.readouterr().out == ""


def test_the_table_says_what_the_optimizer_takes(model, capsys):
    result = mark_trainable(model)
    assert f"{result.total * 12 / 1e6:.2f}" in capsys.readouterr().out


@pytest.mark.parametrize("tied", [True, False])
def test_an_output_layer_over_a_vocabulary_is_no_head(tied):
    model = quantize_model(tiny.llama(tie_word_embeddings=tied), CONFIG)
    result = mark_trainable(model, show=False)
    assert result.counts["head"] == 0
    assert not model.get_output_embeddings().weight.requires_grad
    assert not model.get_input_embeddings().weight.requires_grad


def test_a_quantized_output_head_trains_its_salient_weights():
    model = quantize_model(tiny.llama(tie_word_embeddings=True), SVDQConfig(k=32, lm_head=True))
    result = mark_trainable(model, show=False)
    assert "lm_head.salient_values" in trainable(model)
    assert result.counts["salient"] == 32 * 15
    assert result.total + result.frozen == sum(p.numel() for p in tiny.llama().parameters()) - 96 * 64


def test_nothing_to_train_is_an_error_and_changes_nothing(model):
    before = trainable(model)
    with pytest.raises(ValueError, match=r"nothing would train.*'biases', 'head', 'norms', 'salient'"):
        mark_trainable(model, salient=False, biases=False, norms=False, head=False)
    assert trainable(model) == before
    nothing = quantize_model(tiny.classifier(), SVDQConfig(k=0))
    with pytest.raises(ValueError, match="k=0 has no salient weights"):
        mark_trainable(nothing, biases=False, norms=False, head=False)


def test_a_dense_model_is_refused():
    with pytest.raises(ValueError, match="no quantized layer: quantize_model"):
        mark_trainable(tiny.classifier())


def test_a_model_that_rounds_its_activations_is_refused():
    quantized = quantize_model(tiny.llama(), SVDQConfig.resq())
    with pytest.raises(ValueError, match=r"layers\.0\..* rounds its activations has no gradient"):
        mark_trainable(quantized, show=False)


# Training.


def test_plain_trainer_trains_what_is_marked_and_nothing_else(model, tmp_path):
    mark_trainable(model, show=False)
    marked, before = trainable(model), copy.deepcopy(model.state_dict())
    run = trainer(model, tmp_path)
    run.train()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed <= marked
    assert {f"{name}.salient_values" for name, _ in svdq_layers(model)} <= changed
    assert {"classifier.weight", "bert.encoder.layer.0.attention.output.LayerNorm.weight"} <= changed


def test_adamw_keeps_states_only_of_what_trains(model, tmp_path):
    total = mark_trainable(model, show=False).total
    run = trainer(model, tmp_path)
    run.train()
    moments = [
        value
        for state in run.optimizer.state.values()
        for name, value in state.items()
        if name in ("exp_avg", "exp_avg_sq")
    ]
    assert sum(moment.numel() for moment in moments) == 2 * total


def test_the_tuned_model_is_saved_as_any_other(model, tmp_path):
    model.save_pretrained(tmp_path / "before")
    mark_trainable(model, show=False)
    run = trainer(model, tmp_path / "run")
    run.train()
    run.save_model(str(tmp_path / "after"))
    files = [load_file(tmp_path / folder / "model.safetensors") for folder in ("before", "after")]
    assert {n: (t.shape, t.dtype) for n, t in files[0].items()} == {
        n: (t.shape, t.dtype) for n, t in files[1].items()
    }
    configs = [json.loads((tmp_path / f / "config.json").read_text()) for f in ("before", "after")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    assert len(read_footprint(tmp_path / "after").layers) == 13
    again = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "after")
    ids = batch()["input_ids"]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model.eval()(ids).logits)


def test_mixed_precision_trains_fp32_weights(model, tmp_path):
    mark_trainable(model, show=False)
    before = copy.deepcopy(model.state_dict())
    trainer(model, tmp_path, bf16=True).train()
    after = model.state_dict()
    assert all(after[name].dtype == tensor.dtype for name, tensor in before.items())
    name = "bert.encoder.layer.1.output.dense.salient_values"
    assert after[name].isfinite().all()
    assert not torch.equal(after[name], before[name])


@pytest.mark.parametrize("only_salient", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
def test_gradient_checkpointing_gives_the_same_gradients(reentrant, only_salient):
    model = quantize_model(tiny.classifier(hidden_dropout_prob=0, attention_probs_dropout_prob=0), CONFIG)
    others = dict.fromkeys(("biases", "norms", "head"), not only_salient)
    mark_trainable(model, **others, show=False)
    model.train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.zero_grad()
        model(**batch()).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() == trainable(model)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)
