"""A loop of drawn inputs for a while, and the two ways in which one may end: told what is wrong, or right.

The draws are always the same from the first on, so that a longer run begins as a shorter one does. Not here:
what is drawn (`mutations`).
"""

import faulthandler
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from svdq_hf.format.decode import dense_blocks
from svdq_hf.format.parts import StoredWeight

SECONDS = float(os.environ.get("SVDQ_FUZZ_SECONDS", "24"))
"""Of all fuzz tests together."""
ROUND = 10
"""Draws between two looks at the clock."""
HANGS = 60
"""Seconds after which one input has hung; the slowest takes two."""


class Hang(BaseException):
    """An input takes too long; not an Exception, which commands turn into a line."""


def for_a_while(try_one: Callable[[Any], None], share: float) -> None:
    """Call `try_one(draw)` with draws until the share of the time is over."""
    disable_progress_bar()
    end, tried, rounds = time.monotonic() + SECONDS * share, 0, 0

    def one(data: Any) -> None:
        nonlocal tried
        tried += 1
        with in_time():
            try_one(data.draw)

    while time.monotonic() < end:
        rounds += 1
        choices = settings(
            max_examples=ROUND,
            derandomize=False,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate],
        )
        seed(rounds)(choices(given(st.data())(one)))()
    print(f"{tried} inputs in {SECONDS * share:.0f} s")
    assert tried >= ROUND


@contextmanager
def in_time() -> Iterator[None]:
    """An input that takes too long is an error; where C does not come back, the process ends."""

    def told(*_: object) -> None:
        raise Hang(f"an input has taken {HANGS} seconds")

    before = signal.signal(signal.SIGALRM, told)
    signal.alarm(HANGS)
    faulthandler.dump_traceback_later(2 * HANGS, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def refused(call: Callable[[], Any], allowed: tuple[type[BaseException], ...]) -> Any:
    """What a call returns; None: it has raised what it may, and said something."""
    logging.disable(logging.ERROR)
    try:
        return call()
    except allowed as error:
        if isinstance(error, AssertionError) or not str(error).strip():
            raise
        return None
    finally:
        logging.disable(logging.NOTSET)


def weight_of(stored: StoredWeight, in_features: int, group: int) -> Tensor:
    """The dense weight, float64, in plain torch."""
    parts = {name: part.contiguous() for name, part in stored.as_dict().items()}
    parts["salient_values"] = parts["salient_values"].float()
    return torch.cat([block.double() for _, block in dense_blocks(parts, in_features, group)])


def near(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None, coarse: float = 1e-5) -> None:
    """Assert that `y` is `x @ weight.T + bias`, as near as its dtype allows."""
    wide = x.double()
    expected, size = wide @ weight.T, wide.abs() @ weight.abs().T
    if bias is not None:
        expected, size = expected + bias.double(), size + bias.double().abs()
    allowed = max(coarse, 8 * torch.finfo(y.dtype).eps) * size + torch.finfo(torch.float16).tiny
    assert bool(((y.double() - expected).abs() <= allowed).all())
