"""Perplexity of a text: sliding windows for causal models, masked tokens for masked ones.

The text is one long sequence. A causal model reads windows of `context` tokens that move on by `stride`; each
token is scored once, in the first window that has it. So every scored token has at least `context - stride`
tokens before it, except in the first window. Where the tokenizer has a first token (<bos>), every window
begins with it, as the model's texts did in training: Gemma 3's loss is 3.47 without and 3.26 with it. A
masked model sees each window with every seventh token masked, and is scored on those (a pseudo-perplexity, to
be compared with itself only).
"""

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

EVERY = 7
"""One token in so many is masked: 14 %, about what masked models are trained with."""

CONTEXT = 1024
"""Tokens that a model sees at once by default, where it takes so many."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TextScore:
    """Mean loss in nats over `tokens` scored tokens."""

    loss: float
    tokens: int

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
    model: Any, ids: Tensor, *, context: int = 1024, stride: int = 512, bos: int | None = None
) -> TextScore:
    """Score a causal model on a text.

    Args:
        model: the model.
        ids: the text, `[tokens]`, int64.
        context: most tokens in a window, <bos> included.
        stride: from the start of one window to that of the next.
        bos: token id that every window begins with; None: none.

    Raises:
        ValueError: the loss is not finite, or `stride` does not fit `context`.
    """
    total, count, lead = 0.0, 0, ids.new_tensor([] if bos is None else [bos])
    for start, first, end in windows(ids.numel(), context - len(lead), stride, 1 - len(lead)):
        logits = model(input_ids=torch.cat([lead, ids[start:end]])[None]).logits[0].float()
        before = len(lead) - start - 1  # of a token's place, the place that predicts it
        predicted = logits[before + first : before + end]
        total += float(F.cross_entropy(predicted, ids[first:end], reduction="sum"))
        count += end - first
    return _finite(total, count)


@torch.no_grad()
def masked_score(model: Any, ids: Tensor, tokenizer: Any, *, context: int = 256) -> TextScore:
    """Score a masked model on a text; every model has the same tokens masked.

    Args:
        model: the model.
        ids: the text, `[tokens]`, int64.
        tokenizer: has the special tokens of the model.
        context: most tokens in a window, special tokens aside.

    Raises:
        ValueError: the loss is not finite, or the text is too short.
    """
    total, count = 0.0, 0
    for start in range(0, ids.numel(), context):
        ends = [[tokenizer.cls_token_id], [tokenizer.sep_token_id]]
        whole = torch.tensor([ends[0] + ids[start : start + context].tolist() + ends[1]])
        place = torch.arange(EVERY // 2 + 1, whole.shape[1] - 1, EVERY)  # not the special ends
        hidden = whole.clone()
        hidden[0, place] = tokenizer.mask_token_id
        logits = model(input_ids=hidden).logits[0, place].float()
        total += float(F.cross_entropy(logits, whole[0, place], reduction="sum"))
        count += place.numel()
    return _finite(total, count)


def _finite(total: float, count: int) -> TextScore:
    if not math.isfinite(total):
        raise ValueError("the loss is not finite: the model's logits have a NaN or an infinity")
    if count == 0:
        raise ValueError("no token was scored: the text is too short for this context")
    return TextScore(total / count, count)


def longest_context(model: Any) -> int | None:
    """The longest context that a model's positions allow; None where its config sets no limit.

    A masked model needs two positions for the window's ends; RoBERTa's positions begin after the padding
    token's.
    """
    config = model.config.get_text_config()
    length = getattr(config, "max_position_embeddings", None)
    if not isinstance(length, int) or length < 1:
        return None
    for name, module in model.named_modules():
        padding = getattr(module, "padding_idx", None) if name.endswith("position_embeddings") else None
        if padding is not None and getattr(module, "num_embeddings", None) == length:
            length -= padding + 1
            break
    return length if model.can_generate() else length - 2


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


class PerplexityEvaluator:
    """Scores causal or masked models on one text.

    Args:
        text: the text.
        tokenizer: of the models.
        context: tokens a model sees at once.
        limit: most tokens to score.
        calibration_tokens: tokens at the *end* of the text that are not scored but kept for scores that need
            data.
    """

    def __init__(
        self, text: str, tokenizer: Any, *, context: int, limit: int, calibration_tokens: int = 8192
    ) -> None:
        self.bos: int | None = tokenizer.bos_token_id
        # In the name, so that cells of older runs, which had none, are not taken for these.
        self.task = f"perplexity, context {context}" + ("" if self.bos is None else ", with bos")
        self.tokenizer = tokenizer
        self.context = context
        ids = token_ids(text, tokenizer)
        held = min(calibration_tokens, ids.numel() // 4)
        self.ids, self.rest = ids[: ids.numel() - held][:limit], ids[ids.numel() - held :]

    def __call__(self, model: Any) -> dict[str, Any]:
        """The results of a cell: n, metrics and loss; there are no right answers to count."""
        if model.can_generate():
            stride = max(1, self.context // 2)
            found = causal_score(model, self.ids, context=self.context, stride=stride, bos=self.bos)
        else:
            found = masked_score(model, self.ids, self.tokenizer, context=self.context)
        nothing = dict.fromkeys(("right", "correct", "majority", "kl", "kl_each"))
        metrics = {"perplexity": found.perplexity}
        return {"n": found.tokens, "metrics": metrics, "loss": found.loss, **nothing}

    def calibration(self) -> list[dict[str, Tensor]]:
        """Windows of the end of the text, as batches of token ids `[1, tokens]`, int64."""
        lead = self.rest.new_tensor([] if self.bos is None else [self.bos])
        parts = torch.split(self.rest, self.context - len(lead))
        return [{"input_ids": torch.cat([lead, part])[None]} for part in parts if part.numel() > 1]
