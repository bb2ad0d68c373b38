"""A GLUE task's dev set, for classifiers: loss, KL, and answers that flip from right to wrong and back.

Not here: the tasks' data and metrics (`evaluation.tasks.glue`), texts without labels
(`evaluation.comparison.sentences`).
"""

from pathlib import Path
from typing import Any

import torch

from svdq_hf.evaluation.comparison.answers import Answers, Observed, Reference
from svdq_hf.evaluation.tasks.classification import Score, score_model
from svdq_hf.evaluation.tasks.glue import load_split, tokenize
from svdq_hf.evaluation.tasks.glue_tasks import task_of


class TaskExamples:
    """The whole dev set of a GLUE task.

    Args:
        task: its name.
        tokenizer: of the models.
        data: folder of the task's data; None: the Hub.
        reference: keeps the first model's answers.
    """

    counted = "answers"

    def __init__(self, task: str, tokenizer: Any, data: str | Path | None, reference: Reference) -> None:
        self.task, self.tokenizer, self.reference = task, tokenizer, reference
        self.encoded = tokenize(task, load_split(task, "dev", data), tokenizer)
        self.about = task

    def __call__(self, model: Any) -> Observed:
        """Loss, KL, answers and the task's metrics of a model.

        Raises:
            ValueError: the model has another number of labels than the task.
        """
        labels = task_of(self.task).labels
        if model.config.num_labels != labels:
            raise ValueError(f"it has {model.config.num_labels} labels, and {self.task} has {labels}")
        found = score_model(model, self.encoded, self.tokenizer)
        return self._observed(found)

    def _observed(self, found: Score) -> Observed:
        metrics = found.metrics(self.task)
        if found.regression:
            loss = (found.logits.squeeze(1).double() - found.labels.double()) ** 2
            return Observed(torch.arange(len(loss)), loss=loss, metrics=metrics)
        told = self.reference.observe([Answers(found.logits, found.labels, block=1)])
        return Observed(told.block, told.loss, told.right, told.kl, told.same, metrics=metrics)
