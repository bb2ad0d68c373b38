"""What bench_quality.py scores models on: a text, or a GLUE task's dev set.

Loss and KL from the FP32 model, in nats; batches for the methods that need data, and a few tokens to
look at single layers with. Not here: methods (`quality_peers`), cells and tables (`bench_quality`).
"""

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from svdq_hf.calibration.texts import read_text
from svdq_hf.evaluation.comparison.log_probabilities import divergences_and_agreement, log_probabilities
from svdq_hf.evaluation.comparison.statistics import estimate
from svdq_hf.evaluation.comparison.windows import windows_of
from svdq_hf.evaluation.tasks.classification import GlueEvaluator
from svdq_hf.evaluation.tasks.perplexity import token_ids

SAMPLE = 256
"""Tokens on which the error of layers' outputs is taken."""
BLOCK = 64
"""Neighbouring tokens that the interval of a change of loss draws together, as `svdq compare` does."""


class Task(Protocol):
    """What models are scored on; the first one it scores is the FP32 reference of the rest."""

    name: str

    def __call__(self, model: Any) -> dict[str, Any]:
        """n, loss, kl and metrics of a cell."""

    def calibration(self) -> list[Any]:
        """Batches for the methods that need data."""

    def sample(self) -> list[Any]:
        """A few batches without padding."""


class TextTask:
    """A text in windows that do not overlap, each behind the tokenizer's first token if it has one.

    The reference's log-probabilities stay in memory: 2 bytes times tokens times vocabulary.
    """

    def __init__(self, file: Path, tokenizer: Any, context: int, tokens: int, held: int) -> None:
        ids = token_ids(read_text(file), tokenizer)
        if tokens + held > ids.numel():
            raise ValueError(f"{file}: {ids.numel()} tokens, fewer than {tokens} to score and {held} to hold")
        self.name = f"{file.stem}, {tokens} tokens, context {context}"
        self.windows = windows_of(ids[:tokens], context, tokenizer.bos_token_id)
        self.held = windows_of(ids[-held:], context, tokenizer.bos_token_id)
        self.reference: list[Tensor] = []
        self.dense = torch.empty(0)

    def __call__(self, model: Any) -> dict[str, Any]:
        """Means over all tokens, in nats, the loss of each window, and how often the top token stays."""
        losses, answers = [], []
        for place, window in enumerate(self.windows):
            logits = model(input_ids=window).logits[0, :-1]
            losses.append(F.cross_entropy(logits.float(), window[0, 1:], reduction="none"))
            if self.dense.numel():
                answers.append(divergences_and_agreement(self.reference[place], logits))
            else:
                self.reference.append(log_probabilities(logits))
        loss, each = torch.cat(losses).double(), [float(one.mean()) for one in losses]
        cell = {"n": loss.numel(), "loss": float(loss.mean()), "loss_each": each}
        if not answers:
            self.dense = loss
            return {**cell, "kl": 0.0, "interval": [0.0, 0.0], "metrics": {"same": 1.0}}
        kl, same = (torch.cat(list(part)).double() for part in zip(*answers, strict=True))
        change = estimate(loss - self.dense, torch.arange(loss.numel()) // BLOCK)
        about = {"interval": [change.low, change.high], "metrics": {"same": float(same.mean())}}
        return {**cell, "kl": float(kl.mean()), **about}

    def calibration(self) -> list[Any]:
        """Windows of the end of the text."""
        return [{"input_ids": window} for window in self.held]

    def sample(self) -> list[Any]:
        """The start of the text."""
        return [{"input_ids": self.windows[0][:, :SAMPLE]}]


class GlueTask:
    """A GLUE task's whole dev set."""

    def __init__(self, name: str, tokenizer: Any, data: str | None, held: int) -> None:
        self.name = name
        self.evaluate = GlueEvaluator(name, tokenizer, data, calibration_texts=max(1, held // 64))

    def __call__(self, model: Any) -> dict[str, Any]:
        """Mean loss and KL in nats over the examples, and the task's own metrics."""
        found = self.evaluate(model)
        return {key: found[key] for key in ("n", "right", "loss", "kl", "metrics")}

    def calibration(self) -> list[Any]:
        """Training texts, about 64 tokens each."""
        return self.evaluate.calibration()

    def sample(self) -> list[Any]:
        """The longest texts, one by one."""
        rows = self.evaluate.encoded.remove_columns(["label", "position"]).select(range(3))
        return [{key: torch.tensor([value]) for key, value in row.items()} for row in rows]
