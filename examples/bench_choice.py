"""What choosing the k = 256 salient weights of one layer costs, score by score: time and memory.

    OMP_NUM_THREADS=1 python examples/bench_choice.py               # a quarter of an hour, a Markdown table
    OMP_NUM_THREADS=1 python examples/bench_choice.py 384x384 11008x4096 # out x in: of these alone

`awq` and `spqr` pay for what they need: 128 sequences of 64 tokens through this one layer (in a model
they run through all the layers before it as well), the inputs' norms or their Gram matrix, and for
`spqr` the damped Hessian's Cholesky inverse. The methods take turns, so that a busy machine slows all of
them alike; the ratios are what to trust. Memory is the peak above what the process held before (weight
and inputs among it), in a process of its own for each cell. That block Krylov chooses as the exact SVD
does is checked before anything is timed.
"""

import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from svdq_hf.calibration.inputs import collect_inputs
from svdq_hf.core.saliency import score
from svdq_hf.core.topk import top_positions

K, RANK = 256, 8
SEQUENCES, TOKENS, BATCH = 128, 64, 32
SHAPES = ((384, 384), (768, 768), (1024, 1024), (2048, 2048), (4096, 4096), (11008, 4096))
LEAST_OVERLAP = 0.98
"""Of block Krylov's choice with the exact one, as intersection over union."""

Choice = tuple[Tensor, Tensor]
"""Rows and columns of the chosen weights, `[k]` each."""


class Layer:
    """A layer `[out, in]` and batches of its inputs, both made up.

    The weight is noise and 32 stronger directions, sigma_9 / sigma_8 about 0.96 (MiniLM's layers have
    0.91 to 0.999). Of noise alone the leading space, and so the choice, is hardly determined, and block
    Krylov finds another one than the exact SVD (IoU 0.96 at 384, 0.59 at 1024).
    """

    def __init__(self, shape: tuple[int, int]) -> None:
        generator = torch.Generator().manual_seed(0)
        out, in_features = shape
        strength = 5 / torch.arange(1, 33) ** 0.5
        u, v = (torch.linalg.qr(torch.randn(n, 32, generator=generator)).Q for n in shape)
        noise = torch.randn(shape, generator=generator) / max(shape) ** 0.5
        self.linear = nn.Linear(in_features, out, bias=False, device="meta")
        self.linear.weight = nn.Parameter(noise.addmm_(u * strength, v.T), requires_grad=False)
        loudness = torch.randn(in_features, generator=generator).exp_()
        self.batches = [
            torch.randn(BATCH, TOKENS, in_features, generator=generator).mul_(loudness)
            for _ in range(SEQUENCES // BATCH)
        ]

    @property
    def weight(self) -> Tensor:
        return self.linear.weight.detach()


def magnitude(layer: Layer) -> Choice:
    return top_positions(score("magnitude", layer.weight, {}).scores, K)


def krylov(layer: Layer) -> Choice:
    return top_positions(score("svd", layer.weight, {"rank": RANK, "seed": 0}).scores, K)


def exact(layer: Layer) -> Choice:
    u, s, vh = torch.linalg.svd(layer.weight, full_matrices=False)
    return top_positions(((u[:, :RANK] * s[:RANK]) @ vh[:RANK]).abs(), K)


def awq(layer: Layer) -> Choice:
    seen = collect_inputs(layer.linear, {"": layer.linear}, layer.batches)[""]
    return top_positions(score("awq", layer.weight, {"input_norm": seen.norm}).scores, K)


def spqr(layer: Layer) -> Choice:
    seen = collect_inputs(layer.linear, {"": layer.linear}, layer.batches, gram=True)[""]
    inputs = {"input_gram": seen.gram, "tokens": seen.tokens}
    return top_positions(score("spqr", layer.weight, inputs).scores, K)


METHODS: dict[str, Callable[[Layer], Choice]] = {
    "magnitude": magnitude,
    "svd, block Krylov": krylov,
    "svd, torch.linalg.svd": exact,
    "awq": awq,
    "spqr": spqr,
}


def overlap(a: Choice, b: Choice) -> float:
    """Intersection over union of two choices."""
    first, second = ({*zip(rows.tolist(), columns.tolist(), strict=True)} for rows, columns in (a, b))
    return len(first & second) / len(first | second)


def runs_of(shape: tuple[int, int]) -> int:
    """How many runs: 9 for small layers, 3 for those of 16 million weights and more."""
    return max(3, min(9, 9 - 2 * round(math.log2(math.prod(shape) / 2**20))))


def times(layer: Layer, runs: int) -> dict[str, float]:
    """Median seconds of each method, taking turns; of the slow exact SVD a third as many runs."""
    taken: dict[str, list[float]] = {name: [] for name in METHODS}
    for run in range(runs):
        for name, method in METHODS.items():
            if method is exact and run >= max(1, runs // 3):
                continue
            started = time.perf_counter()
            method(layer)
            taken[name].append(time.perf_counter() - started)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def peak(name: str, shape: tuple[int, int]) -> int:
    """Bytes that a method needs at its peak, in this process, above what was there before."""
    METHODS[name](Layer((320, 320)))  # thread pools and libraries come up before the count
    layer = Layer(shape)
    Path("/proc/self/clear_refs").write_text("5")  # from here on counts the peak; rusage cannot start anew
    before = resident("VmRSS")
    METHODS[name](layer)
    return max(0, resident("VmHWM") - before)


def resident(field: str) -> int:
    """VmRSS, resident bytes of this process, or VmHWM, their peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"this system does not tell memory: /proc/self/status has no {field}")


def peak_of_child(name: str, shape: tuple[int, int]) -> int:
    """The same in a fresh process, that gives freed blocks back at once."""
    command = [sys.executable, __file__, "--peak", name, f"{shape[0]}x{shape[1]}"]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return int(json.loads(done.stdout))


def bench(shape: tuple[int, int], runs: int) -> None:
    """Print the rows of one layer."""
    layer = Layer(shape)
    found = overlap(krylov(layer), exact(layer))
    if found < LEAST_OVERLAP:
        raise RuntimeError(f"{shape}: block Krylov's choice has an IoU of {found:.4f} with the exact one's")
    seconds = times(layer, runs)
    copy = layer.weight.nbytes
    del layer
    for name, taken in seconds.items():
        extra = peak_of_child(name, shape)
        note = f" (IoU with exact {found:.4f})" if name == "svd, block Krylov" else ""
        cells = (
            f"{shape[0]} x {shape[1]}",
            name + note,
            f"{taken:.4f}",
            f"{taken / seconds['magnitude']:.1f}",
            f"{taken / seconds['svd, block Krylov']:.2f}",
            f"{extra / 1e6:.1f} ({extra / copy:.1f})",
        )
        print(f"| {' | '.join(cells)} |", flush=True)


def main(shapes: list[tuple[int, int]]) -> None:
    """Print the table."""
    print(
        f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, {torch.get_num_threads()} threads, load "
        f"{os.getloadavg()[0]:.1f} of {os.cpu_count()} cores, torch {torch.__version__}\n\n| layer | choice "
        "| seconds | / magnitude | / block Krylov | extra memory, MB (FP32 copies of the layer) |\n"
        "|---|---|---|---|---|---|",
        flush=True,
    )
    for shape in shapes:
        bench(shape, runs_of(shape))


def parsed(shape: str) -> tuple[int, int]:
    out, in_features = map(int, shape.split("x"))
    return out, in_features


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peak"]:
        print(peak(sys.argv[2], parsed(sys.argv[3])))
    else:
        main([parsed(shape) for shape in sys.argv[1:]] or list(SHAPES))
