"""A clock for `generate`: when each token came. Not here: what is generated (`evaluation.speed.workload`)."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria


class TokenClock(StoppingCriteria):  # type: ignore[misc]  # transformers ships no types
    """A stopping criterion that never stops, and records the time of each token.

    Args:
        begin: called when the first token has come.
    """

    def __init__(self, begin: Callable[[], None] = lambda: None) -> None:
        self.begin = begin
        self.times: list[float] = []
        """`time.perf_counter()` when each token came, in seconds."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Record a token; `[batch]` of False.

        Args:
            input_ids: `[batch, tokens]`, what is written so far.
            scores: of the next tokens; not looked at.
            **kwargs: of other releases.
        """
        if not self.times:
            self.begin()
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
