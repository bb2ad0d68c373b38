"""Trainer's callback: what is logged, resumed and saved, and gradients that a scaler has scaled."""

import json

import pytest
import tiny_models as tiny
import torch
import transformers as hf
from safetensors.torch import load_file

from svdq_hf import SpectralDecayCallback
from svdq_hf.training.spectral_decay_callback import FACTS, TENSORS

CHOICES = {"tau": 0.3, "every": 3}


def examples():
    generator = torch.Generator().manual_seed(0)
    return [
        {"input_ids": torch.randint(1, 90, (7,), generator=generator), "labels": i % 3} for i in range(64)
    ]


def train(folder, callback, resume=None, **choices):
    arguments = hf.TrainingArguments(
        str(folder),
        **{
            "max_steps": 8,
            "learning_rate": 1e-2,
            "save_strategy": "steps",
            "save_steps": 4,
            "logging_steps": 2,
            "per_device_train_batch_size": 4,
            "use_cpu": True,
            "report_to": [],
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            **choices,
        },
    )
    torch.manual_seed(0)
    trainer = hf.Trainer(tiny.classifier(), arguments, train_dataset=examples(), callbacks=[callback])
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


def test_what_it_sees_is_logged(tmp_path):
    callback = SpectralDecayCallback(**CHOICES)
    trainer = train(tmp_path, callback, save_strategy="no")
    losses = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 4
    for entry in losses:
        assert entry["flagged_layers"] > 0
        assert entry["sigma_1"] > 0
        assert 0.3 <= entry["pcdr"] <= 1
        assert entry["outlier_ratio"] > 1
    assert callback.decay.steps == 8
    assert set(callback.decay.decompositions.values()) == {3}  # at steps 0, 3 and 6
    assert callback.before.keys() == callback.after.keys() == callback.decay.layers.keys()
    assert all(len(values) == 10 for values in callback.after.values())
    assert not trainer.model._forward_pre_hooks


def test_reporters_show_it_where_it_is_asked_before_them(tmp_path):
    class Reporter(hf.TrainerCallback):
        seen: tuple[dict, ...] = ()

        def on_log(self, args, state, control, logs=None, **_):
            self.seen = (*self.seen, dict(logs))

    reporter, callback = Reporter(), SpectralDecayCallback(**CHOICES)
    arguments = hf.TrainingArguments(
        str(tmp_path), max_steps=1, logging_steps=1, use_cpu=True, report_to=[], disable_tqdm=True,
        save_strategy="no", dataloader_pin_memory=False,
    )  # fmt: skip
    callbacks = [reporter, callback]
    trainer = hf.Trainer(tiny.classifier(), arguments, train_dataset=examples(), callbacks=callbacks)
    callback.before_reporters(trainer)
    trainer.train()
    assert "flagged_layers" in reporter.seen[0]


def test_steps_are_those_of_the_optimizer(tmp_path):
    callback = SpectralDecayCallback(**CHOICES)
    train(tmp_path, callback, save_strategy="no", gradient_accumulation_steps=2)
    assert callback.decay.steps == 8


def test_resumed_training_is_that_in_one_go_bit_for_bit(tmp_path):
    whole = train(tmp_path / "whole", SpectralDecayCallback(**CHOICES))
    checkpoint = tmp_path / "whole" / "checkpoint-4"
    assert json.loads((checkpoint / FACTS).read_text())["steps"] == 4
    assert load_file(checkpoint / TENSORS)
    callback = SpectralDecayCallback(resume_from=checkpoint, **CHOICES)
    resumed = train(tmp_path / "resumed", callback, resume=checkpoint)
    assert callback.decay.steps == 8
    assert callback.decay.flagged
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name


def test_a_checkpoint_without_a_state_is_refused(tmp_path):
    train(tmp_path, SpectralDecayCallback(**CHOICES))
    checkpoint = tmp_path / "checkpoint-4"
    (checkpoint / FACTS).unlink()
    with pytest.raises(ValueError, match=r"has no spectral_decay\.json: to resume, name the checkpoint"):
        train(tmp_path, SpectralDecayCallback(**CHOICES), resume=checkpoint)


@pytest.mark.parametrize("unscaled", [False, True], ids=["as scaled", "unscaled by clipping"])
def test_scaled_gradients_are_unscaled_first(unscaled):
    model = tiny.classifier()
    parameter = model.bert.encoder.layer[0].output.dense.weight
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.scaler = scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    callback, state = SpectralDecayCallback(strength=0.0, tau=0.0), hf.TrainerState()
    callback.on_train_begin(None, state, None, model=model)
    ids = tiny.tokens()
    scaler.scale(model(input_ids=ids, labels=torch.zeros(len(ids), dtype=torch.long)).loss).backward()
    scaled = parameter.grad.clone()
    if unscaled:
        scaler.unscale_(optimizer)
    callback.on_pre_optimizer_step(None, state, None, optimizer=optimizer)
    torch.testing.assert_close(parameter.grad, scaled / 1024)


def test_a_callback_that_comes_late_says_so():
    with pytest.raises(ValueError, match="was not there when training began"):
        SpectralDecayCallback().on_pre_optimizer_step(None, None, None, optimizer=None)
