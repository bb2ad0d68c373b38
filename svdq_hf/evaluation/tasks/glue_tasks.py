"""Tasks of GLUE (arXiv 1804.07461): a row each.

Only the standard library is imported, so that a wrong name is told at once. Not here: their data and
metrics (`evaluation.tasks.glue`).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """One GLUE task.

    Attributes:
        columns: its text columns.
        labels: number of labels; 1: a regression.
        metrics: names of `METRICS`.
        dev: name of its dev split on the Hub.
    """

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


def task_of(name: str) -> Task:
    """The task of a name.

    Raises:
        ValueError: unknown task; it lists the known ones.
    """
    if name not in TASKS:
        raise ValueError(f"task {name!r}: must be one of {sorted(TASKS)}")
    return TASKS[name]
