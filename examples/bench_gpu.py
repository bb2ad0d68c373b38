"""A quantized layer on a GPU: whether it is right, then how fast, beside dense bfloat16 and other packages.

    python examples/bench_gpu.py              # eight minutes at most; needs torch and Triton, no network
    python examples/bench_gpu.py --rehearse   # without a GPU, interpreted: tiny, and its times mean nothing

Times are medians of a CUDA graph that goes through as many copies of a layer as no cache holds. Ratios are
dense bfloat16's time over the layer's: above 1 is faster. The peers are optional: pip install bitsandbytes
torchao hqq gemlite. It prints a Markdown table after each part, and leaves out parts that have no time left.
tune_gpu.py tries other shapes of the kernels' tiles.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from functools import partial

if "--rehearse" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import gpu_checks
import torch
import triton
from gpu_llama import Llama, Sizes
from gpu_peers import PEERS
from gpu_timing import eager, median_time
from torch import Tensor, nn

from svdq_hf.core import saliency
from svdq_hf.core.normalized import NormalizedWeight
from svdq_hf.core.topk import top_positions
from svdq_hf.format.encode import encode

SECONDS = 460
REHEARSAL = Sizes(64, 128, 4, 2, 1, 96, 16)
started = time.monotonic()


def check(device: str) -> None:
    """Run the checks; one that fails ends the bench, since a wrong kernel is not timed."""
    for one in (*gpu_checks.ANYWHERE, *(gpu_checks.ON_CUDA if device == "cuda" else ())):
        if device == "cpu" and one is gpu_checks.check_products:
            continue  # a minute in the interpreter, and tests/kernels/triton has it in small
        begin = time.monotonic()
        one(device)
        print(f"right: {one.__name__[6:].replace('_', ' ')}, {time.monotonic() - begin:.1f} s", flush=True)


def ops(device: str) -> None:
    """One layer at several numbers of tokens: dense in microseconds, the others as ratios."""
    wanted = [(4096, 4096), (14336, 4096)] if device == "cuda" else [(64, 128)]
    for out, in_features in wanted:
        tokens = [1, 4, 16, 64, 512] if device == "cuda" else [1, 16, 70]
        weight = torch.randn(out, in_features, device=device) * 0.02
        print(f"\n| {out} x {in_features} | " + " | ".join(f"{count} tokens" for count in tokens) + " |")
        print("|---|" + "---|" * len(tokens), flush=True)
        base: list[float] = []
        for name, make in {"dense bf16, us": dense, "svdq": gpu_checks.packed, **PEERS}.items():
            times = of_layer(name, make, weight, tokens)
            base = base or times
            cells = [f"{1e6 * one:.1f}" if times is base else f"{was / one:.2f}"
                     for one, was in zip(times, base, strict=False)]  # fmt: skip
            print(f"| {name} | " + " | ".join(cells) + " |" if cells else f"{name}: not here", flush=True)


def of_layer(
    name: str, make: Callable[[Tensor], Callable[[Tensor], Tensor]], weight: Tensor, tokens: list[int]
) -> list[float]:
    """Seconds of a layer's call for each number of tokens; none where its package is missing or fails."""
    device = weight.device.type
    try:
        stored = weight.numel() * (2 if name.startswith("dense") else 0.5)
        layers = [make(weight) for _ in range(1 + int(200e6 / stored) if device == "cuda" else 1)]
        found = []
        for count in tokens:
            x = torch.randn(count, weight.shape[1], device=device, dtype=torch.bfloat16)
            right = x.float() @ weight.T
            error = float((layers[0](x).float() - right).norm() / right.norm())
            if not error < 0.2:
                raise ValueError(f"wrong by {error:.2f}: not timed")
            found.append(median_time([lambda layer=layer, x=x: layer(x) for layer in layers], device))
    except Exception as error:  # a peer raises whatever it likes
        if name == "svdq":
            raise
        print(f"{name}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        return []
    return found


def dense(weight: Tensor) -> nn.Linear:
    """A dense layer in bfloat16."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.to(torch.bfloat16), requires_grad=False)
    return layer


def small_call(device: str) -> None:
    """What a call costs beside the work: a 32 x 32 layer, without a graph."""
    weight, x = torch.randn(32, 32, device=device), torch.randn(1, 32, device=device, dtype=torch.bfloat16)
    for name, make in (("dense", dense), ("svdq", gpu_checks.packed)):
        layer, times = make(weight), []
        for _ in range(200 if device == "cuda" else 2):
            begin = time.perf_counter()
            layer(x)
            times.append(time.perf_counter() - begin)
        print(f"a call of a 32 x 32 layer, {name}: {1e6 * statistics.median(times):.0f} us", flush=True)


def quantizing(device: str) -> None:
    """Seconds per billion weights, with the score "svd", and the peak of memory beside the weight."""
    shape = (14336, 4096) if device == "cuda" else (64, 128)
    weight, times = torch.randn(shape, device=device), []
    for _ in range(3 if device == "cuda" else 1):
        begin = time.perf_counter()
        quantize(weight)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    print(f"quantizing: {1e9 / weight.numel() * min(times):.1f} s per billion weights", flush=True)
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        quantize(weight)
        peak = (torch.cuda.max_memory_allocated() - before) / (4 * weight.numel())
        print(f"its peak of memory: {peak:.1f} times the weight in FP32", flush=True)


def quantize(weight: Tensor) -> dict[str, Tensor]:
    """The stored parts of a weight, as `SVDQConfig()` stores it."""
    prepared = NormalizedWeight(weight, gpu_checks.BEST)
    known = {"rank": 8, "seed": 0}
    scores = saliency.score("svd", prepared.normalized, known).scores
    return encode(prepared, *top_positions(scores, 256))


def decoding(device: str) -> None:
    """Tokens a second of a Llama of 1B: eager, compiled, in a graph; and the peak of memory."""
    sizes = Sizes() if device == "cuda" else REHEARSAL
    print("\n| decoding, Llama 1B's sizes | eager | compiled | graph | compiled, graph | GB |")
    print("|---|---|---|---|---|---|")
    for name, make in (("dense bf16", dense), ("svdq, head dense", gpu_checks.packed)):
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()

        def linear(out: int, in_features: int, make: Callable[[Tensor], nn.Module] = make) -> nn.Module:
            weight = torch.randn(out, in_features, device=device) * 0.02
            return dense(weight) if out == sizes.vocabulary else make(weight)

        model = Llama(sizes, linear, device).requires_grad_(False)
        token, place = torch.zeros(2, 1, dtype=torch.int64, device=device)
        cells = [f"{1 / eager(model, token, place):.0f}"]
        if device == "cuda":
            compiled = torch.compile(model, fullgraph=True)
            cells.append(f"{1 / eager(compiled, token, place):.0f}")
            for one in (model, compiled):
                cells.append(f"{1 / median_time([partial(one, token, place)], device):.0f}")
            cells.append(f"{torch.cuda.memory_allocated() / 1e9:.2f}")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
        del model
        torch.compiler.reset()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rehearse", action="store_true", help="in Triton's interpreter, on a CPU")
    options = parser.parse_args()
    device = "cpu" if options.rehearse else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device is here; --rehearse runs without one")
    torch.manual_seed(0)
    name = torch.cuda.get_device_name() if device == "cuda" else "a CPU, interpreted: times mean nothing"
    print(f"{date.today()}, {name}, torch {torch.__version__}, triton {triton.__version__}", flush=True)
    for part in (check, small_call, ops, quantizing, decoding):
        if time.monotonic() - started > SECONDS * 0.8:
            print(f"no time left for {part.__name__}")
            continue
        part(device)
    print(f"{time.monotonic() - started:.0f} s in all")


if __name__ == "__main__":
    with torch.no_grad(), gpu_checks.triton_first():
        main()
