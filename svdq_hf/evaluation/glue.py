"""GLUE: its tasks as rows of one table, their data, metrics, and models fine-tuned and scored by Trainer.

Data comes from the Hub ("nyu-mll/glue") or from a folder `DIR/<task>/` with `train*` and `dev*` (or
`validation*`) files as jsonl, tsv, csv or parquet. Scoring keeps every prediction, in the order of the
dev set, so that any two models can be compared over the same examples. Not here: grids of models.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

try:
    import datasets
    from scipy import stats
    from sklearn import metrics as sk
except ImportError as error:
    raise ImportError("evaluation needs an extra: pip install 'svdq_hf[evaluate]'") from error
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)


@dataclass(frozen=True)
class Task:
    """One GLUE task: its text columns, its number of labels (1: a regression), its metrics, its dev split."""

    columns: tuple[str, ...]
    labels: int = 2
    metrics: tuple[str, ...] = ("accuracy",)
    dev: str = "validation"


TASKS = {
    "cola": Task(("sentence",), metrics=("matthews_correlation",)),
    "mnli": Task(("premise", "hypothesis"), labels=3, dev="validation_matched"),
    "mrpc": Task(("sentence1", "sentence2"), metrics=("accuracy", "f1")),
    "qnli": Task(("question", "sentence")),
    "qqp": Task(("question1", "question2"), metrics=("accuracy", "f1")),
    "rte": Task(("sentence1", "sentence2")),
    "sst2": Task(("sentence",)),
    "stsb": Task(("sentence1", "sentence2"), labels=1, metrics=("pearson", "spearmanr")),
}
"""Source: Wang et al., GLUE (2019). To add a task is to add a row."""

METRICS = {
    "accuracy": lambda labels, found: sk.accuracy_score(labels, found),
    "f1": lambda labels, found: sk.f1_score(labels, found),
    "matthews_correlation": lambda labels, found: sk.matthews_corrcoef(labels, found),
    "pearson": lambda labels, found: stats.pearsonr(labels, found).statistic,
    "spearmanr": lambda labels, found: stats.spearmanr(labels, found).statistic,
}
"""The numbers of `evaluate.load("glue", task)`, which computes them with these same functions."""

FORMATS = {"jsonl": "json", "json": "json", "tsv": "csv", "csv": "csv", "parquet": "parquet"}
LONGEST = 256
"""Tokens an input is cut to; 128 and more for RTE's longest pairs."""


def task_of(name: str) -> Task:
    """The task called `name`, or ValueError with the names there are."""
    if name not in TASKS:
        raise ValueError(f"task {name!r}: must be one of {sorted(TASKS)}")
    return TASKS[name]


def load_split(name: str, split: str, data: str | Path | None = None) -> Any:
    """The "train" or "dev" split of a task, with its text columns and `label`.

    data: a folder that has a folder `name`; None: the Hub.

    Raises:
        ValueError: unknown task, no such folder or file, a column that is missing, labels outside the
            task's set, an empty split, or no network and no folder.
    """
    task = task_of(name)
    if data is None:
        loaded = _from_hub(name, task.dev if split == "dev" else "train")
    else:
        loaded = _from_folder(Path(data) / name, split)
    wanted = [*task.columns, "label"]
    missing = [column for column in wanted if column not in loaded.column_names]
    if missing:
        raise ValueError(f"{name} {split}: no column {missing} among {loaded.column_names}")
    if len(loaded) == 0:
        raise ValueError(f"{name} {split}: the split is empty")
    _check_labels(name, split, task, loaded["label"])
    return loaded.select_columns(wanted)


def _from_hub(name: str, split: str) -> Any:
    try:
        return datasets.load_dataset("nyu-mll/glue", name, split=split)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name}: the Hub's GLUE cannot be reached ({error}); give a folder instead, with "
            f"{name}/train.jsonl and {name}/dev.jsonl (or tsv, csv, parquet)"
        ) from error


def _from_folder(folder: Path, split: str) -> Any:
    stems = ("dev", "validation") if split == "dev" else ("train",)
    files = [
        file
        for file in sorted(folder.glob("*"))
        if file.name.startswith(stems) and file.suffix.removeprefix(".") in FORMATS
    ]
    if not files:
        raise ValueError(f"{folder}: no {' or '.join(stems)} file is there (jsonl, tsv, csv or parquet)")
    kind = files[0].suffix.removeprefix(".")
    with tempfile.TemporaryDirectory() as cache:  # nothing is left in the user's cache
        options = {"sep": "\t"} if kind == "tsv" else {}
        return datasets.load_dataset(
            FORMATS[kind],
            data_files=str(files[0]),
            split="train",
            cache_dir=cache,
            keep_in_memory=True,
            **options,
        )


def _check_labels(name: str, split: str, task: Task, labels: list[Any]) -> None:
    if task.labels == 1:
        wrong = [label for label in labels if not isinstance(label, int | float)]
    else:
        wrong = [label for label in labels if label not in range(task.labels)]
    if wrong:
        allowed = "numbers" if task.labels == 1 else f"0..{task.labels - 1}"
        raise ValueError(f"{name} {split}: label {wrong[0]!r} is not in the task's set, {allowed}")


def tokenize(name: str, split: Any, tokenizer: Any) -> Any:
    """The split as token ids, longest text first, with `label` and the place it had (`position`)."""
    task = task_of(name)

    def encode(rows: dict[str, list[Any]]) -> Any:
        return tokenizer(*(rows[column] for column in task.columns), truncation=True, max_length=LONGEST)

    encoded = split.map(encode, batched=True, remove_columns=list(task.columns))
    lengths = np.array([len(ids) for ids in encoded["input_ids"]])
    order = np.argsort(-lengths, kind="stable")  # texts of like length share a batch: little padding
    return encoded.select(order).add_column("position", order)


@dataclass(frozen=True)
class Score:
    """What a model said on a dev set of n examples, in the set's own order.

    logits: `[n, labels]`, float32; labels: `[n]`.
    """

    logits: Tensor
    labels: Tensor

    @property
    def regression(self) -> bool:
        """Whether the task has numbers for labels."""
        return self.logits.shape[1] == 1

    @property
    def correct(self) -> str | None:
        """A 1 for each right answer and a 0 for each wrong one; None for a regression."""
        if self.regression:
            return None
        return "".join("01"[int(right)] for right in self.logits.argmax(1) == self.labels)

    def metrics(self, name: str) -> dict[str, float]:
        """The task's own metrics."""
        found = self.logits.squeeze(1) if self.regression else self.logits.argmax(1)
        labels, answers = self.labels.numpy(), found.numpy()
        return {metric: float(METRICS[metric](labels, answers)) for metric in task_of(name).metrics}

    @property
    def loss(self) -> float:
        """Mean cross entropy (a regression: mean squared error)."""
        if self.regression:
            return float(F.mse_loss(self.logits.squeeze(1), self.labels.float()))
        return float(F.cross_entropy(self.logits, self.labels))

    def divergence(self, reference: "Score") -> float | None:
        """Mean KL of the answers from a reference's, in nats; None for a regression."""
        if self.regression:
            return None
        log_q, log_p = (F.log_softmax(logits.double(), 1) for logits in (self.logits, reference.logits))
        return float((log_p.exp() * (log_p - log_q)).sum(1).mean())


def score_model(model: Any, encoded: Any, tokenizer: Any, batch_size: int = 32) -> Score:
    """Run a model over a tokenized split through `Trainer`.

    Raises:
        ValueError: a model of another number of labels, or logits that are NaN.
    """
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=_arguments(folder, per_device_eval_batch_size=batch_size),
            data_collator=DataCollatorWithPadding(tokenizer),
        )
        found = trainer.predict(encoded.remove_columns(["position", "label"]))
    logits = torch.from_numpy(np.asarray(found.predictions, dtype=np.float32))
    if torch.isnan(logits).any():
        raise ValueError("the model's logits have a NaN; is it damaged, or in too narrow a dtype?")
    order = torch.tensor(encoded["position"])
    labels = torch.tensor(encoded["label"])
    back = torch.argsort(order)
    return Score(logits[back], labels[back])


def finetune(
    model: Any, name: str, encoded: Any, tokenizer: Any, *, seed: int, epochs: float, learning_rate: float
) -> None:
    """Train a classification model on a tokenized split, in place."""
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
    """A sequence classification model for a task.

    Raises:
        ValueError: the model was trained for another number of labels, or never for any task.
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
        disable_tqdm=True,
        **choices,
    )


class GlueEvaluator:
    """Scores models on a task's whole dev set; the first one is the reference of the rest.

    calibration_texts: texts of the training split, from its start, for the scores that need data.
    """

    def __init__(
        self, name: str, tokenizer: Any, data: str | Path | None = None, calibration_texts: int = 128
    ) -> None:
        self.task = name
        self.tokenizer = tokenizer
        self.data = data
        self.texts = calibration_texts
        self.encoded = tokenize(name, load_split(name, "dev", data), tokenizer)
        self.reference: Score | None = None

    def __call__(self, model: Any) -> dict[str, Any]:
        """n, right, correct, metrics, loss and kl of a cell."""
        found = score_model(model, self.encoded, self.tokenizer)
        if self.reference is None:
            self.reference = found
        correct = found.correct
        return {
            "n": len(found.labels),
            "right": None if correct is None else correct.count("1"),
            "correct": correct,
            "metrics": found.metrics(self.task),
            "loss": found.loss,
            "kl": found.divergence(self.reference),
        }

    def calibration(self) -> list[dict[str, Tensor]]:
        """Batches of training texts, without labels."""
        train = load_split(self.task, "train", self.data)
        train = train.select(range(min(self.texts, len(train))))
        encoded = tokenize(self.task, train, self.tokenizer).remove_columns(["label", "position"])
        collate = DataCollatorWithPadding(self.tokenizer)
        rows = list(encoded)
        return [dict(collate(rows[start : start + 32])) for start in range(0, len(rows), 32)]
