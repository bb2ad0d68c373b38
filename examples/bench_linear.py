"""How fast one quantized layer is on this CPU, beside the dense one and beside other packages' layers.

    python examples/bench_linear.py                          # ten minutes on a quiet machine
    python examples/bench_linear.py 4096x4096 --tokens 1 8   # out x in: of this shape alone
    python examples/bench_linear.py --only "dense fp32" svdq --cpu avx2
    python examples/bench_linear.py 2048x2048 --only svdq --busy 1   # beside a process that takes a core

Ratios are dense FP32's time over the layer's: above 1 is faster. The layers take turns, round after round,
so that a busy machine slows all of them alike; a figure is the median of the rounds. "warm" calls one layer
again and again; "DRAM" goes through as many copies of it as no cache holds, as a large model does. Before
anything is timed every layer's answer is compared with the dense one's.

The peers are optional: pip install bitsandbytes hqq torchao optimum-quanto onnxruntime onnx.
"""

import argparse
import copy
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from itertools import cycle
from unittest.mock import patch

import torch
from linear_peers import BASELINE, CONTENDERS, Call
from torch import Tensor, nn

from svdq_hf.kernels.native import library as native

SHAPES, TOKENS = ("768x768", "3072x768", "4096x4096", "14336x4096"), (1, 8, 64, 512)
ROUNDS, SECONDS, FEWEST = 7, 0.02, 1
BEYOND_CACHE = 600 << 20
"""Bytes that the copies of a layer take together: more than twice the largest cache met."""
PATHS = {"plain": native.PLAIN, "avx2": native.AVX2, "avx512": native.AVX512}


def check(name: str, call: Call, weight: Tensor) -> None:
    """Stop at a layer that answers wrongly.

    Raises:
        ValueError: its answer is further from the dense layer's than rounding to 4 bits explains.
    """
    x = torch.randn(5, weight.shape[1], generator=torch.Generator().manual_seed(1))
    right = x @ weight.T
    found = call(x.to(CONTENDERS[name].dtype)).float()
    error = float((found - right).norm() / right.norm())
    if not error < CONTENDERS[name].error:
        raise ValueError(f"{name} is wrong by {error:.3f}: it is not timed")


def exactness(layer: nn.Module, weight: Tensor) -> str:
    """How far ours and dense FP32 are from float64, each on its own weights."""
    x = torch.randn(64, weight.shape[1], generator=torch.Generator().manual_seed(1))
    errors = []
    for few in (x[:4], x):  # in registers, and by blocks of dense rows
        for w, y in ((layer.dequantize(), layer(few)), (weight, few @ weight.T)):
            right = few.double() @ w.double().T
            errors.append(float((y - right).norm() / right.norm()))
    return "4 tokens: svdq {:.1e}, dense {:.1e}; 64 tokens: svdq {:.1e}, dense {:.1e}".format(*errors)


def copies(call: Call, weight: Tensor) -> list[Call]:
    """As many copies of a layer as no cache holds; none of one that cannot be copied."""
    if not isinstance(call, nn.Module):
        return []
    stored = sum(part.nbytes for part in (*call.parameters(), *call.buffers()))
    try:
        return [call, *(copy.deepcopy(call) for _ in range(BEYOND_CACHE // max(stored, 1)))]
    except RuntimeError:  # quanto's tensors cannot be copied
        return []


def seconds(call: Callable[[], object], times: int) -> float:
    """Mean time of some calls in a row."""
    started = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - started) / times


def medians(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """The median over the rounds of each call's time."""
    times = {name: max(FEWEST, int(SECONDS / max(seconds(call, 2), 1e-6))) for name, call in calls.items()}
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            found[name].append(seconds(call, times[name]))
    return {name: statistics.median(each) for name, each in found.items()}


def one_after_another(layers: Sequence[Call], x: Tensor) -> Callable[[], object]:
    """A call that takes the next layer each time."""
    turn = cycle(layers)
    return lambda: next(turn)(x)


def bench(shape: str, tokens: Sequence[int], names: Sequence[str], cold: bool) -> dict[str, dict[int, float]]:
    """Seconds by layer and number of tokens."""
    out, in_features = map(int, shape.split("x"))
    weight = torch.randn(out, in_features, generator=torch.Generator().manual_seed(0)) * 0.02
    layers = {}
    for name in names:
        call = CONTENDERS[name].make(weight, CONTENDERS[name].dtype)
        check(name, call, weight)
        layers[name] = copies(call, weight) if cold else [call]
    if "svdq" in layers:
        print(f"{shape}: relative error against float64, {exactness(layers['svdq'][0], weight)}", flush=True)
    found: dict[str, dict[int, float]] = {name: {} for name in names if layers[name]}
    for count in tokens:
        x = torch.randn(count, in_features, generator=torch.Generator().manual_seed(2))
        calls = {name: one_after_another(layers[name], x.to(CONTENDERS[name].dtype)) for name in found}
        for name, median in medians(calls).items():
            found[name][count] = median
    return found


def table(title: str, found: dict[str, dict[int, float]]) -> str:
    """A Markdown table: dense FP32 in milliseconds, the others as ratios."""
    base = found[BASELINE]
    lines = [
        f"| {title} | " + " | ".join(f"{count} tokens" for count in base) + " |",
        "|---|" + "---|" * len(base),
    ]
    lines.append(f"| {BASELINE}, ms | " + " | ".join(f"{1e3 * base[count]:.3f}" for count in base) + " |")
    for name, times in found.items():
        if name != BASELINE:
            lines.append(
                f"| {name} | " + " | ".join(f"{base[count] / times[count]:.2f}" for count in base) + " |"
            )
    return "\n".join(lines)


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """So many processes that do nothing, each as fast as a core allows."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("shapes", nargs="*", default=SHAPES)
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--threads", type=int, help="of torch and of everyone (all cores)")
    parser.add_argument("--cpu", choices=PATHS, help="the native library's path (the best)")
    parser.add_argument("--busy", type=int, default=0, help="processes that take a core meanwhile")
    options = parser.parse_args()
    torch.set_num_threads(options.threads or torch.get_num_threads())
    names = [BASELINE, *(name for name in options.only if name != BASELINE)]
    for name in list(names):
        why = CONTENDERS[name].missing()
        if why is not None:
            print(f"{name}: not here ({why})")
            names.remove(name)
    best = native.best_path()
    path = best if options.cpu is None else min(best, PATHS[options.cpu])
    print(f"{date.today()}, {platform.processor() or platform.machine()}, {os.cpu_count()} cores, "
          f"{torch.get_num_threads()} threads, {options.busy} busy processes, torch {torch.__version__}, "
          f"path {next(key for key, value in PATHS.items() if value == path)}")  # fmt: skip
    fast = native.fast_path() if path == best else path
    ours = patch.multiple("svdq_hf.kernels.cpu", best_path=lambda: path, fast_path=lambda: fast)
    with ours, torch.no_grad(), busy_processes(options.busy):
        for shape in options.shapes:
            print(table(f"{shape}, warm", bench(shape, options.tokens, names, cold=False)), flush=True)
            few = [count for count in options.tokens if count <= 8]
            if few and int(shape.split("x")[1]) >= 4096:
                print(table(f"{shape}, DRAM", bench(shape, few, names, cold=True)), flush=True)


if __name__ == "__main__":
    main()
