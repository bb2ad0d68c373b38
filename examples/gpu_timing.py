"""Times of calls on a GPU, for bench_gpu.py: in a CUDA graph, without Python's part, or driven by Python."""

import statistics
import time
from collections.abc import Callable

import gpu_checks
import torch
from torch import Tensor


def median_time(calls: list[Callable[[], Tensor]], device: str) -> float:
    """Median seconds of a call: on a GPU of a graph that makes all of them in turn."""
    if device == "cpu":
        begin = time.perf_counter()
        calls[0]()
        return time.perf_counter() - begin
    graph, _ = gpu_checks.captured(lambda: [call() for call in calls][-1])
    return statistics.median(events(graph.replay) for _ in range(25)) / len(calls)


def events(call: Callable[[], object]) -> float:
    """Seconds of a call, by CUDA events."""
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    call()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1000


def eager(model: Callable[[Tensor, Tensor], Tensor], token: Tensor, place: Tensor) -> float:
    """Median seconds of a step that Python drives."""
    times = []
    with torch.no_grad():
        for _ in range(12 if token.is_cuda else 1):
            begin = time.perf_counter()
            model(token, place)
            if token.is_cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
    return statistics.median(times[2:] or times)
