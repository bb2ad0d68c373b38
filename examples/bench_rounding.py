"""What each rounding loses of single matrices: a look at a method before whole models are measured by it.

    python examples/bench_rounding.py MODEL --text FILE [--layers 0 15] [--rows 64] [--method NAME ...]

The matrices of some layers of a causal model, rounded by ours and by the peers of bench_quality.py that need
no data. "Weights" is the squared error over the squared weights, "outputs" the squared error of the layer's
output on 256 tokens over its square; both are means over the matrices, in thousandths. A trellis with a
window of 16 bits takes a minute for a million weights: `--rows` takes evenly spread rows of each matrix,
which is no loss for methods that round each row by itself (trellis, HIGGS, plain groups).
"""

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from bench_quality import OURS, Layer, dense_weight, inputs_of, our_layers
from quality_peers import PEERS, Packed, rounded
from quality_tasks import SAMPLE
from quality_trellis import trellis
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from svdq_hf import SVDQConfig
from svdq_hf.calibration.texts import read_text
from svdq_hf.evaluation.tasks.perplexity import token_ids
from svdq_hf.quantize.selection import layers_to_convert

Method = Callable[[Tensor], Packed]


def methods() -> dict[str, Method]:
    """Every method without data by name."""
    ours = {name: partial(by_us, make()) for name, make in OURS.items() if is_for_one_matrix(make())}
    theirs = {name: partial(peer.quantize, inputs=None) for name, peer in PEERS.items() if not peer.data}
    longest = partial(rounded, inputs=None, by=partial(trellis, window=16))
    return {**ours, **theirs, "trellis, window 16 (our code)": longest}


def is_for_one_matrix(config: SVDQConfig) -> bool:
    """Whether a choice asks neither for what a layer sees nor for the other layers."""
    return not config.error_feedback and config.target_bits is None


def by_us(config: SVDQConfig, weight: Tensor) -> Packed:
    """A matrix as this package quantizes it."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight.clone())
    return next(our_layers(nn.Sequential(layer), config, None))[1]


def matrices(folder: Path, text: Path, chosen: list[int], rows: int | None) -> Iterator[Layer]:
    """Weights of the chosen layers, some of their rows, with what they see of a text."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = token_ids(read_text(text), AutoTokenizer.from_pretrained(folder))[:SAMPLE]
    kept = [f".layers.{number}." for number in chosen]
    modules = {
        name: module
        for name, module in layers_to_convert(model, SVDQConfig()).items()
        if any(part in f".{name}" for part in kept)
    }
    inputs = inputs_of(model, modules, [{"input_ids": ids[None]}])
    for name, module in modules.items():
        weight = dense_weight(module)
        if rows is not None:
            weight = weight[:: max(1, len(weight) // rows)]
        yield Layer(module, weight, inputs[name])


def row(method: Method, layers: list[Layer]) -> tuple[float, float, float]:
    """Bits, and errors of weights and outputs in thousandths."""
    bits, weights, outputs = 0, 0.0, 0.0
    for layer in layers:
        packed = method(layer.weight.clone())
        found = packed.dequantize().detach().float()
        bits += packed.bits
        weights += float((found - layer.weight).square().sum() / layer.weight.square().sum())
        outputs += layer.error(found) ** 2
    size = sum(layer.weight.numel() for layer in layers)
    return bits / size, 1e3 * weights / len(layers), 1e3 * outputs / len(layers)


@torch.no_grad()
def main() -> None:
    """Read the command line and print the table."""
    every = methods()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 15])
    parser.add_argument("--rows", type=int, help="rows of each matrix; all if left out")
    parser.add_argument("--method", nargs="+", choices=every, default=[*every], metavar="NAME")
    given = parser.parse_args()
    layers = list(matrices(given.model, given.text, given.layers, given.rows))
    print("| method | bits | weights | outputs |\n| --- | --- | --- | --- |")
    for name in given.method:
        try:
            bits, weights, outputs = row(every[name], layers)
        except Exception as error:  # a peer may fail in any way; the others still run
            print(f"{name}: does not run here: {type(error).__name__}: {error}", flush=True)
            continue
        print(f"| {name} | {bits:.3f} | {weights:.2f} | {outputs:.2f} |", flush=True)


if __name__ == "__main__":
    main()
