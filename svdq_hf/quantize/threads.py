"""Threads of torch while one matrix is quantized: one for a small matrix, all for a large one if they help.

A small step is over before a second thread has woken; and where another process keeps that thread's core
busy, every step waits until the system gives the core back, small or large: MiniLM took ten times as long,
a matrix of a million weights as well. So a few steps are timed before a large matrix. `torch.set_num_threads`
holds for the thread that calls it, and for threads that use torch for the first time before it is set back,
which keep the one thread: so it is set for no longer than one matrix takes. (transformers quantizes in the
thread that loads; its pool only reads, and ends with the loading.) Not here: the threads of the
kernels (`kernels.native`), and several processes (`checkpoint.streaming.workers`).
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

SMALL = 1 << 21
"""Weights of a matrix that one thread always quantizes: two gain a fifth at most, on an idle machine."""

STEPS, STEP_NUMBERS = 40, 1 << 18
"""Timed steps, and the numbers in each: together longer than the few milliseconds for which a system lets a
process run, so that another one is noticed."""

KEPT = 1.0
"""Seconds for which an answer of `more_help` holds."""

_answers: dict[int, tuple[float, bool]] = {}


@contextmanager
def threads_for(weights: int) -> Iterator[None]:
    """Context manager: as many threads of torch as a matrix is worth; afterwards as many as before.

    Args:
        weights: of the matrix.
    """
    before = torch.get_num_threads()
    if before == 1 or (weights >= SMALL and more_help(before)):
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def more_help(threads: int) -> bool:
    """Whether so many threads are faster than one at present.

    Args:
        threads: of torch; what they are set to afterwards.
    """
    asked, answer = _answers.get(threads, (-KEPT, False))
    if time.monotonic() - asked < KEPT:
        return answer
    numbers = torch.ones(STEP_NUMBERS)
    torch.set_num_threads(1)
    one = seconds_of_steps(numbers)
    torch.set_num_threads(threads)
    answer = seconds_of_steps(numbers) < one
    _answers[threads] = time.monotonic(), answer
    return answer


def seconds_of_steps(numbers: torch.Tensor) -> float:
    """Time of a few steps, after one that wakes the threads.

    Args:
        numbers: `[n]`; changed in place.
    """
    numbers.neg_()
    started = time.perf_counter()
    for _ in range(STEPS):
        numbers.neg_()
    return time.perf_counter() - started
