"""Windows of a text with masked tokens, for masked models, which must say what stood there.

Not here: what is masked (`evaluation.tasks.masking`), models that write (`evaluation.comparison.windows`).
"""

from typing import Any

import torch
from torch import Tensor

from svdq_hf.evaluation.comparison.answers import Answers, Observed, Reference, run_over
from svdq_hf.evaluation.tasks.masking import EVERY, Masked, masked_window


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
