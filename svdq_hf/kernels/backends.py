"""Backends of products with a stored weight: an ordered list; the first that supports a call computes it.

To add one: a file with three functions of the signatures in `Backend` (more if it knows a faster way for
stacked experts and for embeddings), which imports what not everybody has only when it computes, and one line
of `BACKENDS` before the reference. `supports` gives the reason of a refusal in words for users. The arguments
have passed `kernels.contract`; wrong salient positions a backend must refuse itself (`check_positions` of
`kernels.positions` does it) or survive. Tests use the list, so a new line is tested against the reference
(tests/kernels/test_backends.py).
Not here: the ops and their gradients (`kernels.linear_op`), the call that skips torch's dispatcher
(`kernels.cpu_direct`).
"""

import logging
from collections.abc import Callable
from functools import cache
from typing import Final, NamedTuple

import torch
from torch import Tensor

from svdq_hf.format.parts import StoredWeight
from svdq_hf.kernels import cpu, reference
from svdq_hf.kernels.triton import backend as triton

logger = logging.getLogger(__name__)


class Backend(NamedTuple):
    """Code that computes products with a stored weight W `[out, in]`.

    Attributes:
        name: for users.
        supports: `(x, stored, in_features, group)` -> None, or the reason why it does not compute such a
            call.
        linear: `(x, stored, bias, in_features, group, fast)` -> `x @ W.T + bias`, in the dtype of x.
        input_gradient: `(gradient, stored, in_features, group)` -> `gradient @ W`, in the dtype of gradient.
        experts: `(x, stacked, ends, in_features, group)` -> each token times its expert's matrix; None: one
            product for each expert.
        rows: `(ids, stored, in_features, group, dtype)` -> those rows of W; None: they are taken out of the
            parts, and dequantized.
    """

    name: str
    supports: Callable[[Tensor, StoredWeight, int, int], str | None]
    linear: Callable[[Tensor, StoredWeight, Tensor | None, int, int, bool], Tensor]
    input_gradient: Callable[[Tensor, StoredWeight, int, int], Tensor]
    experts: Callable[[Tensor, StoredWeight, Tensor, int, int], Tensor] | None = None
    rows: Callable[[Tensor, StoredWeight, int, int, torch.dtype], Tensor] | None = None


BACKENDS: Final = (
    Backend("native", cpu.supports, cpu.linear, cpu.input_gradient),
    Backend("triton", triton.supports, triton.linear, triton.input_gradient, triton.experts, triton.rows),
    Backend("reference", reference.supports, reference.linear, reference.input_gradient),
)
"""In the order in which they are tried; the last computes everything, on every device."""


LOOKS_AT_DATA: Final = () if triton.is_here() else (torch.Tag.cudagraph_unsafe,)
"""Tags of ops that Triton computes without a look at data, and the reference not."""


class Choice(NamedTuple):
    """The backend that computes a call, and the reasons why earlier ones do not, by name.

    >>> Choice("reference", {"native": "the tensors are on cuda, not on a CPU"}).taken
    'reference'
    """

    taken: str
    refused: dict[str, str]


def backend_for(x: Tensor, stored: StoredWeight, in_features: int, group: int) -> Backend:
    """The backend that computes a call.

    Args:
        x: activations `[..., in]`, or a gradient `[..., out]`.
        stored: the weight `[out, in]`.
        in_features: its columns.
        group: columns that share a scale.
    """
    for backend in BACKENDS[:-1]:
        reason = backend.supports(x, stored, in_features, group)
        if reason is None:
            return backend
    if not x.is_cpu:
        _say_reference_computes(x.device.type, reason)  # of the last that was asked: Triton's
    return BACKENDS[-1]


def choice(x: Tensor, stored: StoredWeight, in_features: int, group: int) -> Choice:
    """The backend that computes `x @ W.T`, with the reasons of those before it.

    Args:
        x: activations `[..., in]`.
        stored: the weight `[out, in]`.
        in_features: its columns.
        group: columns that share a scale.

    Raises:
        RuntimeError: no backend supports the call, which the last one must always do.
    """
    refused: dict[str, str] = {}
    for backend in BACKENDS:
        reason = backend.supports(x, stored, in_features, group)
        if reason is None:
            return Choice(backend.name, refused)
        refused[backend.name] = reason
    raise RuntimeError("the last backend computes everything")


@cache
def _say_reference_computes(device: str, reason: str) -> None:
    """Log one warning for each kind of device and reason."""
    logger.warning(
        "quantized layers on %s are computed by plain torch (%s): each call dequantizes the whole weight, "
        "which is slower than a dense layer",
        device,
        reason,
    )
