"""GLUE (arXiv 1804.07461): the data of its tasks, and their metrics.

Data comes from the Hub ("nyu-mll/glue") or from a folder `DIR/<task>/` with `train*` and `dev*` (or
`validation*`) files as jsonl, tsv, csv or parquet. Not here: the table of tasks
(`evaluation.tasks.glue_tasks`); models, which are fine-tuned and scored in `evaluation.tasks.classification`.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from svdq_hf.core.release import how_to_install
from svdq_hf.evaluation.tasks.glue_tasks import Task, task_of

try:
    import datasets
    from scipy import stats
    from sklearn import metrics as sk
except ImportError as error:
    raise ImportError(f"evaluation needs an extra: {how_to_install('evaluate')}") from error


METRICS = {
    "accuracy": lambda labels, found: sk.accuracy_score(labels, found),
    "f1": lambda labels, found: sk.f1_score(labels, found),
    "matthews_correlation": lambda labels, found: sk.matthews_corrcoef(labels, found),
    "pearson": lambda labels, found: stats.pearsonr(labels, found).statistic,
    "spearmanr": lambda labels, found: stats.spearmanr(labels, found).statistic,
}
"""The numbers of `evaluate.load("glue", task)`, which computes them with these same functions."""


def measure(
    name: str, labels: Sequence[float], found: Sequence[float], script: str | Path | None = None
) -> dict[str, float]:
    """The metrics of a task.

    Args:
        name: of the task.
        labels: the right answers.
        found: the model's answers.
        script: a local copy of the `evaluate` library's metric "glue", a folder or a .py file, which then
            computes them; it is never downloaded, since it is code. None: the package's own code.

    Returns:
        The value by the metric's name.

    Raises:
        ValueError: unknown task.

    >>> measure("rte", [1, 0, 1, 1], [1, 0, 0, 1])
    {'accuracy': 0.75}
    """
    if script is None:
        return {metric: float(METRICS[metric](labels, found)) for metric in task_of(name).metrics}
    import evaluate

    official = evaluate.load(str(script), name).compute(predictions=found, references=labels)
    return {metric: float(value) for metric, value in official.items()}


FORMATS = {"jsonl": "json", "json": "json", "tsv": "csv", "csv": "csv", "parquet": "parquet"}
LONGEST = 256
"""Tokens an input is cut to; 128 and more for RTE's longest pairs."""


def load_split(name: str, split: str, data: str | Path | None = None) -> Any:
    """A split of a task, with its text columns and `label`.

    Args:
        name: of the task.
        split: "train" or "dev".
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
    """A split as token ids, longest text first.

    Args:
        name: of the task.
        split: as `load_split` returns it.
        tokenizer: of the model.

    Returns:
        The data set with the tokenizer's columns, `label`, and `position`: the row it had in `split`.
    """
    task = task_of(name)

    def encode(rows: dict[str, list[Any]]) -> Any:
        return tokenizer(*(rows[column] for column in task.columns), truncation=True, max_length=LONGEST)

    encoded = split.map(encode, batched=True, remove_columns=list(task.columns))
    lengths = np.array([len(ids) for ids in encoded["input_ids"]])
    order = np.argsort(-lengths, kind="stable")  # texts of like length share a batch: little padding
    return encoded.select(order).add_column("position", order)
