"""A window of text with every seventh token masked: what a masked model is scored on.

The same tokens are masked for every model. Not here: who reads the windows (`evaluation.tasks.perplexity`,
`evaluation.comparison.masked`).
"""

from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

EVERY: Final = 7
"""One token in so many is masked: 14 %, about what masked models are trained with."""


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
    """A window with every seventh token masked, between the tokenizer's special tokens, if it has any.

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
    places = range(EVERY // 2 + len(ends[0]), whole.shape[1] - len(ends[1]), EVERY)
    place = torch.tensor(places, dtype=torch.int64)  # none in a window of three tokens
    hidden = whole.clone()
    hidden[0, place] = tokenizer.mask_token_id
    return Masked(hidden, place, whole[0, place])
