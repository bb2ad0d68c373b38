"""Windows of a text with masked tokens, for masked models, which must say what stood there.

Every seventh token is hidden, the same ones for each model. Not here: models that write
(`evaluation.comparison.windows`).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from svdq_hf.evaluation.comparison.answers import Answers, Observed, Reference, run_over
from svdq_hf.evaluation.tasks.perplexity import EVERY


class Masked(NamedTuple):
    """A window with masked tokens.

    Attributes:
        hidden: `[1, tokens]`, int64, what a model reads.
        place: `[masked]`, int64, where the masks are.
        wanted: `[masked]`, int64, what stood there.
    """

    hidden: Tensor
    place: Tensor
    wanted: Tensor


def masked_window(ids: Tensor, tokenizer: Any) -> Masked:
    """A window with every seventh token masked, between the tokenizer's special tokens.

    Args:
        ids: `[tokens]`, int64.
        tokenizer: has the special tokens.

    Raises:
        ValueError: it has no mask.
    """
    if tokenizer.mask_token_id is None:
        raise ValueError("its tokenizer has no mask token, which a masked model is measured with")
    ends = [[] if end is None else [end] for end in (tokenizer.cls_token_id, tokenizer.sep_token_id)]
    whole = torch.tensor([ends[0] + ids.tolist() + ends[1]])
    place = torch.arange(EVERY // 2 + len(ends[0]), whole.shape[1] - len(ends[1]), EVERY)
    hidden = whole.clone()
    hidden[0, place] = tokenizer.mask_token_id
    return Masked(hidden, place, whole[0, place])


class MaskedWindows:
    """A text in windows with masked tokens.

    Args:
        ids: the text, `[tokens]`, int64.
        context: tokens of a window, special ones aside.
        tokenizer: has the special tokens.
        reference: keeps the first model's answers.
    """

    counted = "masked tokens"

    def __init__(self, ids: Tensor, context: int, tokenizer: Any, reference: Reference) -> None:
        parts = [masked_window(part, tokenizer) for part in torch.split(ids, context) if part.numel() > EVERY]
        self.windows = [part for part in parts if part.place.numel()]
        self.reference = reference
        self.about = f"context {context}"

    def __call__(self, model: Any) -> Observed:
        """Loss, KL and top tokens of a model."""
        return self.reference.observe(run_over(model, self.windows, _behind_masks))


def _behind_masks(model: Any, window: Masked) -> Answers:
    return Answers(model(input_ids=window.hidden).logits[0, window.place], window.wanted)
