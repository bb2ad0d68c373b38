"""Sequence classifiers: fine-tuned and scored by `Trainer`.

Scoring keeps every answer, in the order of the dev set, so that any two models can be compared over the
same examples. Not here: tasks, their data and metrics (`evaluation.tasks.glue`), and sweeps over models
(`evaluation.sweep`).
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)
from transformers.utils import logging as hf_logging

from svdq_hf.evaluation.tasks.glue import load_split, measure, tokenize
from svdq_hf.evaluation.tasks.glue_tasks import task_of

CALIBRATION_TEXTS = 128
"""Texts of the training split, from its start, for the scores that need data."""


@dataclass(frozen=True)
class Score:
    """Answers of a model on a dev set of n examples, in the set's own order.

    Attributes:
        logits: `[n, labels]`, float32; one column in a regression.
        labels: `[n]`, the right answers.
    """

    logits: Tensor
    labels: Tensor

    @property
    def regression(self) -> bool:
        """Whether the task's labels are numbers."""
        return self.logits.shape[1] == 1

    @property
    def correct(self) -> str | None:
        """A string with 1 for each right answer and 0 for each wrong one; None for a regression."""
        if self.regression:
            return None
        return "".join("01"[int(right)] for right in self.logits.argmax(1) == self.labels)

    @property
    def majority(self) -> int | None:
        """Number of examples that have the commonest label; None for a regression."""
        return None if self.regression else int(torch.bincount(self.labels).max())

    def metrics(self, name: str, script: str | Path | None = None) -> dict[str, float]:
        """The metrics of a task.

        Args:
            name: of the task.
            script: see `glue.measure`.
        """
        found = self.logits.squeeze(1) if self.regression else self.logits.argmax(1)
        return measure(name, self.labels.tolist(), found.tolist(), script)

    @property
    def loss(self) -> float:
        """Mean cross entropy (a regression: mean squared error)."""
        if self.regression:
            return float(F.mse_loss(self.logits.squeeze(1), self.labels.float()))
        return float(F.cross_entropy(self.logits, self.labels))

    def divergence(self, reference: "Score") -> Tensor | None:
        """KL divergence of each answer from a reference's.

        Args:
            reference: the answers of another model on the same examples.

        Returns:
            `[n]`, float64, in nats; None for a regression.
        """
        if self.regression:
            return None
        log_q, log_p = (F.log_softmax(logits.double(), 1) for logits in (self.logits, reference.logits))
        return (log_p.exp() * (log_p - log_q)).sum(1)


def score_model(model: Any, encoded: Any, tokenizer: Any, batch_size: int = 32) -> Score:
    """Run a model over a tokenized split through `Trainer`.

    Args:
        model: a sequence classification model.
        encoded: the split, as `tokenize` returns it.
        tokenizer: pads the batches.
        batch_size: examples in a batch.

    Raises:
        ValueError: logits that are NaN.
    """
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=_arguments(folder, per_device_eval_batch_size=batch_size),
            data_collator=DataCollatorWithPadding(tokenizer),
            preprocess_logits_for_metrics=_logits,
        )
        found = trainer.predict(encoded.remove_columns(["position", "label"]))
    logits = torch.from_numpy(np.asarray(found.predictions, dtype=np.float32))
    if torch.isnan(logits).any():
        raise ValueError("the model's logits have a NaN; is it damaged, or in too narrow a dtype?")
    order = torch.tensor(encoded["position"])
    labels = torch.tensor(encoded["label"])
    back = torch.argsort(order)
    return Score(logits[back], labels[back])


def _logits(outputs: Any, labels: Any) -> Any:
    """The first output of a model; BART's classifier returns its encoder's states, too."""
    return outputs[0] if isinstance(outputs, tuple) else outputs


def finetune(
    model: Any, encoded: Any, tokenizer: Any, *, seed: int, epochs: float, learning_rate: float
) -> None:
    """Train a classification model on a tokenized split, in place.

    Args:
        model: a sequence classification model.
        encoded: the split, as `tokenize` returns it.
        tokenizer: pads the batches.
        seed: of shuffling and dropout.
        epochs: passes over the split.
        learning_rate: peak, after a warm-up of a tenth of the steps.
    """
    with tempfile.TemporaryDirectory() as folder:
        arguments = _arguments(
            folder,
            seed=seed,
            num_train_epochs=epochs,
            learning_rate=learning_rate,
            per_device_train_batch_size=16,
            warmup_steps=0.1,
            lr_scheduler_type="linear",
            train_sampling_strategy="group_by_length",
            disable_tqdm=not hf_logging.is_progress_bar_enabled(),
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=encoded.remove_columns(["position"]),
            data_collator=DataCollatorWithPadding(tokenizer),
        )
        trainer.train()
    model.eval()


def classifier(folder: str | Path, name: str, **choices: Any) -> Any:
    """Load a sequence classification model for a task.

    Args:
        folder: of the model.
        name: of the task.
        **choices: further arguments of `from_pretrained`.

    Raises:
        ValueError: the model has another number of labels, or no trained classifier.
    """
    load = AutoModelForSequenceClassification.from_pretrained
    model, report = load(folder, output_loading_info=True, **choices)
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ValueError(
            f"{folder}: the model has no weights for {missing}, so its answers are random; fine-tune it "
            "first (examples/finetune_glue.py)"
        )
    labels = task_of(name).labels
    if model.config.num_labels != labels:
        raise ValueError(f"{folder}: the model has {model.config.num_labels} labels, {name} has {labels}")
    return model


def _arguments(folder: str, **choices: Any) -> TrainingArguments:
    return TrainingArguments(
        output_dir=folder,
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        **{"disable_tqdm": True, **choices},
    )


class GlueEvaluator:
    """Scores models on a task's whole dev set; the first model is the reference for the others.

    Args:
        name: of the task.
        tokenizer: of the models.
        data: folder of the task's data; None: the Hub.
        calibration_texts: number of texts, from the start of the training split, for scores that need data.
        script: see `glue.measure`.
    """

    def __init__(
        self,
        name: str,
        tokenizer: Any,
        data: str | Path | None = None,
        calibration_texts: int = CALIBRATION_TEXTS,
        script: str | Path | None = None,
    ) -> None:
        self.task = name
        self.script = script
        self.tokenizer = tokenizer
        self.data = data
        self.texts = calibration_texts
        self.encoded = tokenize(name, load_split(name, "dev", data), tokenizer)
        self.reference: Score | None = None

    def __call__(self, model: Any) -> dict[str, Any]:
        """The results of a cell: n, right, correct, majority, metrics, loss, kl and kl_each."""
        found = score_model(model, self.encoded, self.tokenizer)
        if self.reference is None:
            self.reference = found
        correct, kl = found.correct, found.divergence(self.reference)
        return {
            "n": len(found.labels),
            "right": None if correct is None else correct.count("1"),
            "correct": correct,
            "majority": found.majority,
            "metrics": found.metrics(self.task, self.script),
            "loss": found.loss,
            "kl": None if kl is None else float(kl.mean()),
            "kl_each": None if kl is None else [float(f"{one:.4g}") for one in kl.tolist()],
        }

    def calibration(self) -> list[dict[str, Tensor]]:
        """Batches of training texts, without labels: token ids and masks `[texts, tokens]`, int64."""
        train = load_split(self.task, "train", self.data)
        train = train.select(range(min(self.texts, len(train))))
        encoded = tokenize(self.task, train, self.tokenizer).remove_columns(["label", "position"])
        collate = DataCollatorWithPadding(self.tokenizer)
        rows = list(encoded)
        return [dict(collate(rows[start : start + 32])) for start in range(0, len(rows), 32)]
