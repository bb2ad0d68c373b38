"""Perplexity of a text: sliding windows for causal models, masked tokens for masked ones.

The text is one long sequence. A causal model reads windows of `context` tokens that move on by `stride`; each
token is scored once, in the first window that has it. So every scored token has at least `context - stride`
tokens before it, except in the first window. Where the tokenizer has a first token (<bos>), every window
begins with it, as the model's texts did in training: Gemma 3's loss is 3.47 without and 3.26 with it. A
masked model sees each window with every seventh token masked, and is scored on those (a pseudo-perplexity, to
be compared with itself only). KL compares the distributions of every scored token with the dense model's,
which runs beside the other, since logits of a large vocabulary do not fit into memory. Not here: what is
masked (`evaluation.tasks.masking`), the cells of a sweep (`evaluation.tasks.language_modeling`).
"""

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.utils import logging as hf_logging

from svdq_hf.calibration.texts import longest_input
from svdq_hf.evaluation.tasks.masking import masked_window

CONTEXT = 1024
"""Tokens that a model sees at once by default, where it takes so many."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TextScore:
    """Mean loss in nats over `tokens` scored tokens; KL of each from a reference's, `[tokens]`, or None."""

    loss: float
    tokens: int
    kl: Tensor | None = field(default=None, repr=False, compare=False)

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss)


def token_ids(text: str, tokenizer: Any, limit: int | None = None) -> Tensor:
    """A text as one sequence of token ids, without special tokens.

    Args:
        text: the text.
        tokenizer: of the model.
        limit: most ids to return; None: all.

    Returns:
        `[tokens]`, int64.

    Raises:
        ValueError: fewer than two tokens.
    """
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False)["input_ids"][0]
    if ids.numel() < 2:
        raise ValueError(f"the text has {ids.numel()} tokens; at least 2 are needed")
    return ids[:limit]  # type: ignore[no-any-return]


def windows(tokens: int, context: int, stride: int, scored: int = 1) -> Iterator[tuple[int, int, int]]:
    """The windows over a sequence of tokens.

    Args:
        tokens: length of the sequence.
        context: most tokens in a window.
        stride: from the start of one window to that of the next.
        scored: first token to score: 1, since nothing comes before token 0; 0 where a <bos> does.

    Yields:
        Start of the window, first token scored in it, end of the window.

    Raises:
        ValueError: `stride` is not between 1 and `context - 1`.

    >>> list(windows(10, 6, 3))
    [(0, 1, 6), (3, 6, 9), (6, 9, 10)]
    """
    if not 0 < stride < context:
        raise ValueError(f"stride={stride}: must be from 1 on and below the context length, {context}")
    for start in range(0, tokens, stride):
        end = min(start + context, tokens)
        if scored < end:
            yield start, scored, end
        scored = end
        if end == tokens:
            return


@torch.no_grad()
def causal_score(
    model: Any,
    ids: Tensor,
    *,
    context: int = 1024,
    stride: int = 512,
    bos: int | None = None,
    reference: Any = None,
) -> TextScore:
    """Score a causal model on a text.

    Args:
        model: the model.
        ids: the text, `[tokens]`, int64.
        context: most tokens in a window, <bos> included.
        stride: from the start of one window to that of the next.
        bos: token id that every window begins with; None: none.
        reference: the dense model, from whose distributions KL is measured; None: no KL.

    Raises:
        ValueError: the loss is not finite, or `stride` does not fit `context`.
    """
    sums, lead = _Sums(reference is not None), ids.new_tensor([] if bos is None else [bos])
    places = list(windows(ids.numel(), context - len(lead), stride, 1 - len(lead)))
    for start, first, end in hf_logging.tqdm(places, desc="Reading the text", leave=False):
        window = torch.cat([lead, ids[start:end]])[None]
        before = len(lead) - start - 1  # of a token's place, the place that predicts it
        scored = slice(before + first, before + end)
        found = [
            one(input_ids=window).logits[0, scored].float() for one in (model, reference) if one is not None
        ]
        sums.add(ids[first:end], *found)
    return sums.score()


@torch.no_grad()
def masked_score(
    model: Any, ids: Tensor, tokenizer: Any, *, context: int = 256, reference: Any = None
) -> TextScore:
    """Score a masked model on a text; every model has the same tokens masked.

    Args:
        model: the model.
        ids: the text, `[tokens]`, int64.
        tokenizer: has the special tokens of the model.
        context: most tokens in a window, special tokens aside.
        reference: the dense model, from whose distributions KL is measured; None: no KL.

    Raises:
        ValueError: the loss is not finite, the text is too short, or the tokenizer has no mask.
    """
    sums = _Sums(reference is not None)
    for start in hf_logging.tqdm(range(0, ids.numel(), context), desc="Reading the text", leave=False):
        window = masked_window(ids[start : start + context], tokenizer)
        found = [
            one(input_ids=window.hidden).logits[0, window.place].float()
            for one in (model, reference)
            if one is not None
        ]
        sums.add(window.wanted, *found)
    return sums.score()


@dataclass
class _Sums:
    """Sums over the scored tokens of windows."""

    compared: bool
    total: float = 0.0
    count: int = 0
    kl: list[Tensor] = field(default_factory=list)

    def add(self, right: Tensor, logits: Tensor, reference: Tensor | None = None) -> None:
        """Add a window's tokens `[tokens]` and the logits `[tokens, vocabulary]` that predict them."""
        self.total += float(F.cross_entropy(logits, right, reduction="sum"))
        self.count += right.numel()
        if reference is not None:
            self.kl.append(divergence(logits, reference))

    def score(self) -> TextScore:
        if not math.isfinite(self.total):
            raise ValueError("the loss is not finite: the model's logits have a NaN or an infinity")
        if self.count == 0:
            raise ValueError("no token was scored: the text is too short for this context")
        kl = torch.cat(self.kl) if self.compared else None
        return TextScore(self.total / self.count, self.count, kl)


def divergence(logits: Tensor, reference: Tensor) -> Tensor:
    """KL divergence of each token's distribution from the reference's.

    Args:
        logits: `[tokens, vocabulary]`.
        reference: logits of the same shape.

    Returns:
        `[tokens]`, float32, in nats.

    >>> divergence(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 0.0]]))
    tensor([0.])
    """
    log_q, log_p = logits.log_softmax(1), reference.log_softmax(1)
    return (log_p.exp() * (log_p - log_q)).sum(1).clamp_min_(0.0)  # below 0 only by rounding


def longest_context(model: Any) -> int | None:
    """The longest context that a model's positions allow; None where its config sets no limit.

    A masked model needs two positions for the window's ends.
    """
    length = longest_input(model)
    return length if length is None or model.can_generate() else length - 2


def context_of(model: Any, asked: int | None = None) -> int:
    """The context to score a model with: as requested, or 1024, or less where the model takes less.

    Args:
        model: the model.
        asked: the length requested; None: the default.

    Raises:
        ValueError: `asked` is more than the model takes, or less than 2.
    """
    longest = longest_context(model)
    if asked is not None and not 2 <= asked <= (longest or asked):
        allowed = (
            "2 or more" if longest is None else f"from 2 to {longest}, which the model's positions allow"
        )
        raise ValueError(f"{model.name_or_path}: context {asked}: must be {allowed}")
    if asked is None and longest is not None and longest < CONTEXT:
        logger.warning("%s: context %d, the longest that its positions allow", model.name_or_path, longest)
        return longest
    return asked or CONTEXT
