"""What a causal model of 1, 3, 7 or 14 billion weights takes on this machine: disk, memory, time, speed.

    python examples/which_preset.py                       # half a minute; Markdown on standard output
    python examples/which_preset.py --rate 10.1           # with bytes a second of a model of yours, in GB

Sizes are exact: the shapes of public models (Llama 3.2 1B and 3B, Llama 2 7B, Qwen2.5 14B) by the stored
format, what stays dense in bfloat16. The rest is extrapolated from two measurements on this machine: the time
(of one thread) that quantizing takes for each weight of a 4096 x 4096 matrix, and the packed bytes that
layers of that size multiply in a second, read from memory. Decoding reads every packed byte and the dense
head once for a token, so

    tokens a second = bytes a second / bytes read for a token

which is an upper bound: attention, norms and Python come on top. `svdq bench` on a small model tells how
much: give what it reached (tokens a second times the file's size) as --rate.
"""

import argparse
import math
import os
import platform
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch

from svdq_hf import SVDQConfig
from svdq_hf.format.parts import part_specs
from svdq_hf.nn.linear import SVDQLinear
from svdq_hf.quantize.weight import quantize_weight

SIZE, COPIES, ROUNDS = 4096, 12, 15
"""A matrix to measure with; and copies of it, more than caches hold."""
INTERPRETER = 0.6e9
"""Bytes of Python with torch and transformers imported (0.4), and of buffers."""
WORKING_SET = 1
"""FP32 copies of the largest matrix while it is quantized, in blocks of rows: what a layer of a 7B took, and
its head (docs/results/scale.md)."""
BFLOAT16, FLOAT32 = 2, 4


class Shape(NamedTuple):
    """A decoder: hidden and inner width, layers, width of queries and of keys, vocabulary, tied head."""

    hidden: int
    inner: int
    layers: int
    queries: int
    keys: int
    vocabulary: int
    tied: bool

    def matrices(self) -> Iterator[tuple[int, int]]:
        """`(out, in)` of a layer's linear layers."""
        yield from ((self.queries, self.hidden), (self.keys, self.hidden), (self.keys, self.hidden))
        yield from ((self.hidden, self.queries), (self.hidden, self.inner))
        yield from [(self.inner, self.hidden)] * 2

    @property
    def table(self) -> int:
        """Weights of the embedding, and of the head."""
        return self.hidden * self.vocabulary


MODELS = {
    "1B (Llama 3.2)": Shape(2048, 8192, 16, 2048, 512, 128256, True),
    "3B (Llama 3.2)": Shape(3072, 8192, 28, 3072, 1024, 128256, True),
    "7B (Llama 2)": Shape(4096, 11008, 32, 4096, 4096, 32000, False),
    "14B (Qwen2.5)": Shape(5120, 13824, 48, 5120, 1024, 152064, False),
}
PRESETS = {
    "`small()`": SVDQConfig.small(),
    "`best()`": SVDQConfig.best(),
    "`best(lm_head=True)`": SVDQConfig.best(lm_head=True),
    "`best(bits=8)`": SVDQConfig.best(bits=8),
}


class Needs(NamedTuple):
    """What a model takes: its weights in quantized layers, bytes in all, and bytes read for a token."""

    weights: int
    stored: float
    read: float
    largest: int

    @property
    def quantizing(self) -> float:
        """Bytes of memory that `svdq quantize` takes, streamed."""
        return INTERPRETER + WORKING_SET * FLOAT32 * self.largest


def packed_bytes(out: int, in_features: int, config: SVDQConfig) -> int:
    """Bytes of a stored weight `[out, in]`."""
    specs = part_specs(out, in_features, config.scheme).values()
    return sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in specs)


def needs(shape: Shape, config: SVDQConfig) -> Needs:
    """What a model of this shape takes."""
    matrices = [(*one,) for one in shape.matrices()] * shape.layers
    layers = sum(packed_bytes(*one, config) for one in matrices)
    weights, largest = sum(math.prod(one) for one in matrices), max(map(math.prod, matrices))
    head = shape.table * BFLOAT16
    if config.lm_head:
        head = packed_bytes(shape.vocabulary, shape.hidden, config)
        weights, largest = weights + shape.table, shape.table
    embedding = 0 if shape.tied else shape.table * BFLOAT16
    return Needs(weights, layers + head + embedding, layers + head, largest)


def seconds_per_weight(config: SVDQConfig) -> float:
    """Processor time of quantizing, for each weight."""
    weight = torch.randn(SIZE // 2, SIZE // 2, generator=torch.Generator().manual_seed(0))
    times = []
    for _ in range(3):
        started = time.process_time()
        quantize_weight(weight, config, "measured")
        times.append(time.process_time() - started)
    return min(times) / weight.numel()


def bytes_per_second() -> float:
    """Packed bytes that layers multiply with one token in a second, each layer out of memory."""
    config = SVDQConfig(k=0)
    weight = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    parts, _ = quantize_weight(weight, config, "measured")
    layers = [SVDQLinear(SIZE, SIZE, config.scheme, bias=False) for _ in range(COPIES)]
    for layer in layers:
        layer.load_parts({name: part.clone() for name, part in parts.items()})
    x, size = torch.randn(1, SIZE), sum(part.nbytes for part in parts.values())
    best = [math.inf] * COPIES
    with torch.inference_mode():
        for _ in range(ROUNDS):
            for place, layer in enumerate(layers):  # each by itself: what interrupts one is not the others'
                started = time.perf_counter()
                layer(x)
                best[place] = min(best[place], time.perf_counter() - started)
    return size * COPIES / sum(best)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rate", type=float, metavar="GB", help="GB a second instead of the measured one")
    options = parser.parse_args()
    rate = 1e9 * options.rate if options.rate else bytes_per_second()
    print(f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, {os.cpu_count()} cores, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}: {rate / 1e9:.1f} GB a second\n\n"
          "| model | preset | file and memory to run, GB | memory to quantize, GB | minutes of one thread "
          "| tokens a second, at most |\n|---|---|---|---|---|---|")  # fmt: skip
    paces = {name: seconds_per_weight(config) for name, config in PRESETS.items()}
    for model, shape in MODELS.items():
        for name, config in PRESETS.items():
            found = needs(shape, config)
            speed = f"{rate / found.read:.1f}"
            print(f"| {model} | {name} | {found.stored / 1e9:.1f} | {found.quantizing / 1e9:.1f} "
                  f"| {found.weights * paces[name] / 60:.1f} | {speed} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
