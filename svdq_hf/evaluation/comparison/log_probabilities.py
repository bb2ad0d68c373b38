"""Log-probabilities of a model's answers, stored in half precision, and the KL divergence between two.

Both sides of a divergence are rounded to half precision, so that a model is at exactly 0 from itself. What
that leaves in a divergence is about 1e-6: at -5 half precision has steps of 2**-8, and a KL goes with the
square of an error. Not here: which answers (`evaluation.comparison.windows` and its neighbours).
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

POSITIONS = 128
"""Worked on at a time: with 262144 tokens in a vocabulary, 134 MB in float32."""
LEAST = -6e4
"""Stands for what half precision cannot hold: a token that a model excludes."""


def log_probabilities(logits: Tensor) -> Tensor:
    """Log-probabilities in half precision: exact enough near 0, where the probability is.

    Args:
        logits: `[positions, classes]`.

    Returns:
        `[positions, classes]`, float16.
    """
    return torch.cat([_halved(F.log_softmax(part.float(), -1)) for part in torch.split(logits, POSITIONS)])


def divergences(reference: Tensor, logits: Tensor) -> Tensor:
    """KL divergence of each answer from the reference's.

    Args:
        reference: `[positions, classes]`, as `log_probabilities` returns them.
        logits: `[positions, classes]`, of another model on the same input.

    Returns:
        `[positions]`, float64, in nats.
    """
    return torch.cat([divergence for divergence, _ in _compared(reference, logits)])


def divergences_and_agreement(reference: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """The KL divergences, and whether the likeliest answer is the same.

    Args:
        reference: `[positions, classes]`, as `log_probabilities` returns them.
        logits: `[positions, classes]`, of another model on the same input.

    Returns:
        `[positions]`, float64, in nats; and `[positions]`, bool.
    """
    parts = list(_compared(reference, logits))
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def _compared(reference: Tensor, logits: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    for known, part in zip(torch.split(reference, POSITIONS), torch.split(logits, POSITIONS), strict=True):
        found = _halved(F.log_softmax(part.float(), -1))
        log_p, log_q = (F.log_softmax(one.float(), -1) for one in (known, found))  # which sum to 1 again
        divergence = (log_p.exp() * (log_p - log_q)).sum(-1, dtype=torch.float64)
        yield divergence, known.argmax(-1) == found.argmax(-1)


def _halved(logs: Tensor) -> Tensor:
    return logs.clamp(min=LEAST).half()
