"""How far should error feedback trust what it has seen? Layers' errors on other text, by damping and tokens.

    python examples/bench_damping.py MODEL --text FILE [--tokens 256 1024 8192] [--layers 3]

For a few layers of a causal model or an encoder, the error of the outputs on the end of FILE, over that of
rounding without feedback. What feedback has seen is the start of FILE, or batches made without data
("synthetic"). "shrinkage" takes the damping from the data: Ledoit and Wolf's estimate of how far the Gram
matrix of so few tokens lies from the true one (Journal of Multivariate Analysis 88, 2004), layer by layer.
"""

import argparse
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from svdq_hf import SVDQConfig
from svdq_hf.calibration.inputs import InputStatistics, collect_inputs
from svdq_hf.calibration.synthetic import synthetic_batches
from svdq_hf.calibration.texts import read_text
from svdq_hf.core.column_scale import column_scale
from svdq_hf.evaluation.tasks.perplexity import token_ids
from svdq_hf.quantize.layer import matrix_of, quantized_layer
from svdq_hf.quantize.selection import layers_to_convert

WINDOW = 256
HELD = 4096
"""Tokens of the text's end, on which errors are taken."""
DAMPINGS = (0.0, 0.1, 0.3, 1.0, 3.0)
SHRINKAGE = "shrinkage"


class Seen(NamedTuple):
    """What a layer saw: its statistics, and each token's squared length, squared, summed up.

    Lengths are those of the inputs times the weight's column scale `[in]`, as feedback has them.
    """

    statistics: InputStatistics
    fourth: float
    scale: Tensor


def loaded(folder: str) -> Any:
    """The dense model in FP32: a causal one where its config says so, or else an encoder."""
    named = AutoConfig.from_pretrained(folder).architectures or [""]
    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    kind = AutoModelForCausalLM if named[0] in causal else AutoModel
    return kind.from_pretrained(folder, dtype=torch.float32).eval()


def some_layers(model: nn.Module, blocks: int) -> dict[str, nn.Module]:
    """The linear layers of so many blocks, spread evenly over the model."""
    layers = layers_to_convert(model, SVDQConfig())
    numbers = sorted({number for name in layers if (number := block_of(name)) is not None})
    if not numbers:
        raise ValueError(f"{type(model).__name__}: no linear layer's name has the number of a block")
    wanted = {numbers[(2 * place + 1) * len(numbers) // (2 * blocks)] for place in range(blocks)}
    return {name: layer for name, layer in layers.items() if block_of(name) in wanted}


def block_of(name: str) -> int | None:
    """The number in a layer's name.

    >>> block_of("model.layers.7.mlp.up_proj"), block_of("pooler.dense")
    (7, None)
    """
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def windows(ids: Tensor) -> list[dict[str, Tensor]]:
    """Batches of one window each."""
    return [{"input_ids": part[None]} for part in ids.split(WINDOW)]


def what_layers_see(model: nn.Module, layers: dict[str, nn.Module], batches: list[Any]) -> dict[str, Seen]:
    """Statistics of the inputs of some layers, with the fourth powers that shrinkage needs."""
    fourth = dict.fromkeys(layers, 0.0)
    scales = {name: column_scale(matrix_of(layer).float()).float() for name, layer in layers.items()}

    def add(name: str) -> Any:
        def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            lengths = (arguments[0].detach() * scales[name]).square().sum(-1).double()
            fourth[name] += float(lengths.square().sum())

        return hook

    hooks = [layer.register_forward_pre_hook(add(name)) for name, layer in layers.items()]
    try:
        statistics = collect_inputs(model, layers, batches, gram=True)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: Seen(found, fourth[name], scales[name]) for name, found in statistics.items()}


def shrinkage(seen: Seen) -> float:
    """The damping at which the Gram matrix is expected to be nearest to the true one.

    With S the mean of x x^T, and m that of its diagonal, Ledoit and Wolf shrink S to (1 - r) S + r m I, where
    r = mean of |x x^T - S|^2 / tokens / |S - m I|^2; that is S with r / (1 - r) of m on its diagonal.
    """
    gram, tokens = seen.statistics.gram, seen.statistics.tokens
    if gram is None:
        raise ValueError("shrinkage needs the Gram matrix")
    second = (gram * torch.outer(seen.scale, seen.scale)).double() / tokens
    far = second - second.diagonal().mean() * torch.eye(len(second), dtype=second.dtype)
    noise = (seen.fourth / tokens - float(second.square().sum())) / tokens
    share = min(max(noise / float(far.square().sum()), 0.0), 0.99)
    return share / (1 - share)


def error(weight: Tensor, rounded: Tensor, gram: Tensor) -> float:
    """Relative error of the outputs of inputs with this Gram matrix."""
    lost = rounded - weight
    return math.sqrt(float(((lost @ gram) * lost).sum() / ((weight @ gram) * weight).sum()))


def errors(layers: dict[str, nn.Module], seen: dict[str, Seen], held: dict[str, Tensor]) -> dict[str, float]:
    """For each damping the mean, over layers, of the error over that without feedback."""
    found: dict[str, list[float]] = {}
    for name, layer in layers.items():
        weight = matrix_of(layer).float()
        plain = error(weight, quantized_layer(name, layer, SVDQConfig.best()).dequantize(), held[name])
        dampings = {**{f"{one:g}": one for one in DAMPINGS}, SHRINKAGE: shrinkage(seen[name])}
        for title, damping in dampings.items():
            config = SVDQConfig.best(error_feedback=True, damping=damping)
            rounded = quantized_layer(name, layer, config, seen[name].statistics).dequantize()
            found.setdefault(title, []).append(error(weight, rounded, held[name]) / plain)
    return {title: sum(each) / len(each) for title, each in found.items()}


def rows(options: argparse.Namespace) -> Iterator[tuple[str, dict[str, float]]]:
    """What was seen, and the errors of each damping."""
    model = loaded(options.model)
    layers = some_layers(model, options.layers)
    ids = token_ids(read_text(options.text), AutoTokenizer.from_pretrained(options.model))
    if max(options.tokens, default=0) + HELD > len(ids):
        raise ValueError(f"{options.text}: {len(ids)} tokens, fewer than are seen and {HELD} more")
    statistics = collect_inputs(model, layers, windows(ids[-HELD:]), gram=True)
    held = {name: seen.gram for name, seen in statistics.items() if seen.gram is not None}
    yield "synthetic", errors(layers, what_layers_see(model, layers, synthetic_batches(model)), held)
    for tokens in options.tokens:
        yield f"{tokens} tokens", errors(layers, what_layers_see(model, layers, windows(ids[:tokens])), held)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, nargs="*", default=[256, 1024, 8192])
    parser.add_argument("--layers", type=int, default=3, help="blocks of layers to look at")
    options = parser.parse_args()
    logging.disable_progress_bar()
    titles = [*(f"{one:g}" for one in DAMPINGS), SHRINKAGE]
    print(f"| seen | {' | '.join(titles)} |\n|---|{'---|' * len(titles)}")
    for seen, found in rows(options):
        print(f"| {seen} | {' | '.join(f'{found[title]:.3f}' for title in titles)} |", flush=True)


if __name__ == "__main__":
    main()
