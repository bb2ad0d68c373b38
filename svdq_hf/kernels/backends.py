"""Which code computes a product: one ordered list, of which the first that supports the call does it.

To add one, say a Triton kernel for CUDA: a file `kernels/triton/linear.py` with three functions of the
signatures in `Backend`, imported in its `supports` only where CUDA is, and one line of `BACKENDS` before the
reference. `supports` says why not in words that a user reads; what it is given has passed `contract`, and
salient positions it must refuse or survive by itself (`positions.check_positions` does the first). Tests take
the list as it is, so a new line is tested against the reference (tests/kernels/test_backends.py).
Not here: the ops and their gradients (`linear_op`), the call that skips torch's dispatcher (`cpu_direct`).
"""

import logging
from collections.abc import Callable
from functools import cache
from typing import Final, NamedTuple

from torch import Tensor

from svdq_hf.format.parts import StoredWeight
from svdq_hf.kernels import cpu, reference

logger = logging.getLogger(__name__)


class Backend(NamedTuple):
    """Code that computes products with a stored weight.

    supports: `(x, stored, in_features, group)`: None, or the reason why it does not compute such a call.
    linear: `(x, stored, bias, in_features, group, fast)`: `x @ W.T + bias`, in the dtype of x.
    input_gradient: `(gradient, stored, in_features, group)`: `gradient @ W`, likewise.
    """

    name: str
    supports: Callable[[Tensor, StoredWeight, int, int], str | None]
    linear: Callable[[Tensor, StoredWeight, Tensor | None, int, int, bool], Tensor]
    input_gradient: Callable[[Tensor, StoredWeight, int, int], Tensor]


BACKENDS: Final = (
    Backend("native", cpu.supports, cpu.linear, cpu.input_gradient),
    Backend("reference", reference.supports, reference.linear, reference.input_gradient),
)
"""In the order in which they are asked; the last computes everything, everywhere."""


class Choice(NamedTuple):
    """The backend that a call takes, and why those before it were not taken, by name.

    >>> Choice("reference", {"native": "codes are of 8 bits, not 4"}).taken
    'reference'
    """

    taken: str
    refused: dict[str, str]


def backend_for(x: Tensor, stored: StoredWeight, in_features: int, group: int) -> Backend:
    """The backend for `x` `[..., in]`, or a gradient `[..., out]`."""
    for backend in BACKENDS[:-1]:
        if backend.supports(x, stored, in_features, group) is None:
            return backend
    if not x.is_cpu:
        _say_reference_computes(x.device.type)
    return BACKENDS[-1]


def choice(x: Tensor, stored: StoredWeight, in_features: int, group: int) -> Choice:
    """Which backend computes `x @ W.T`, and the reasons of those that are asked before it."""
    refused: dict[str, str] = {}
    for backend in BACKENDS:
        reason = backend.supports(x, stored, in_features, group)
        if reason is None:
            return Choice(backend.name, refused)
        refused[backend.name] = reason
    raise RuntimeError("the last backend computes everything")


@cache
def _say_reference_computes(device: str) -> None:
    """One line for each kind of device."""
    logger.warning(
        "quantized layers on %s are computed by plain torch: each call dequantizes the whole weight, "
        "which is slower than a dense layer",
        device,
    )
