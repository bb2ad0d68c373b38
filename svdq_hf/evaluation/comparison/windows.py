"""Windows of a text, for models that write: causal ones, and encoders with a decoder.

Windows do not overlap, and each begins with the tokenizer's first token where it has one, as the model's
texts did in training. Not here: masked models (`evaluation.comparison.masked`), perplexity with overlapping
windows (`evaluation.tasks.perplexity`).
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from svdq_hf.evaluation.comparison.answers import Answers, Observed, Reference, run_over

OWN_TEXT = Path(__file__).with_name("text.txt")
"""A text of the project's own, under its licence: prose, talk, instructions, code, tables, five languages."""


def windows_of(ids: Tensor, context: int, first: int | None = None) -> list[Tensor]:
    """A sequence of tokens in windows that do not overlap; one of a single token is left out.

    Args:
        ids: `[tokens]`, int64.
        context: most tokens of a window, the first included.
        first: token that each window begins with; None: none.

    Returns:
        Windows `[1, tokens]`, int64.

    >>> [window.tolist() for window in windows_of(torch.arange(5, 10), context=4, first=1)]
    [[[1, 5, 6, 7]], [[1, 8, 9]]]
    """
    lead = ids.new_tensor([] if first is None else [first])
    parts = torch.split(ids, context - lead.numel())
    return [torch.cat([lead, part])[None] for part in parts if part.numel() > 1]


class CausalWindows:
    """A text that causal models read on, each token predicted from those before it in its window.

    Args:
        ids: the text, `[tokens]`, int64.
        context: tokens of a window.
        first: token that each window begins with; None: none.
        reference: keeps the first model's answers.
    """

    counted = "tokens"

    def __init__(self, ids: Tensor, context: int, first: int | None, reference: Reference) -> None:
        self.windows = windows_of(ids, context, first)
        self.reference = reference
        self.about = f"context {context}"

    def __call__(self, model: Any) -> Observed:
        """Loss, KL and top tokens of a model."""
        return self.reference.observe(run_over(model, self.windows, _next_tokens))


def _next_tokens(model: Any, window: Tensor) -> Answers:
    return Answers(model(input_ids=window).logits[0, :-1], window[0, 1:])


class HalvedWindows:
    """A text in windows of which an encoder reads the first half, and a decoder writes the second.

    Args:
        ids: the text, `[tokens]`, int64.
        context: tokens of a window.
        reference: keeps the first model's answers.
    """

    counted = "tokens"

    def __init__(self, ids: Tensor, context: int, reference: Reference) -> None:
        self.windows = windows_of(ids, context)
        self.reference = reference
        self.about = f"the second half of each {context}"

    def __call__(self, model: Any) -> Observed:
        """Loss, KL and top tokens of a model."""
        return self.reference.observe(run_over(model, self.windows, _second_half))


def _second_half(model: Any, window: Tensor) -> Answers:
    half = window.shape[1] // 2
    read, written = window[:, :half], window[:, half:]
    return Answers(model(input_ids=read, labels=written).logits[0], written[0])
