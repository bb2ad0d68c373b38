"""What four bits for activations cost, and what rotations and a subspace of 8 bits save: one row a method.

    python examples/bench_resq.py FOLDER --text wikitext2.valid.tokens --calibration c4_sample.jsonl
    python examples/bench_resq.py FOLDER --text ... --calibration ... --rows resq quarot --json out.json

Each row quantizes the model anew and runs it on the same windows of the text; KL is that of the next token's
distribution against the 16-bit model's, in nats a token, and so is the change of the loss. Rows whose name
ends in "weights" read no data; where a KV cache is packed, every earlier token is read from it. A row takes
a minute or two of one core for a model of 135M.
"""

import argparse
import copy
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers as hf

import svdq_hf
from svdq_hf import SVDQConfig
from svdq_hf.calibration.texts import read_text, text_batches
from svdq_hf.core.subspace import channel_axes, principal_axes
from svdq_hf.integrations.transformers.cache import cache_keyword
from svdq_hf.quantize.bases import Covariances, bases_of, seen_covariances, weight_covariances
from svdq_hf.quantize.convert import convert_layers
from svdq_hf.quantize.integer_activations import layer_inputs
from svdq_hf.quantize.residual_stream import find_stream
from svdq_hf.quantize.rotate import Bases, fold_norms, rotate

FED = 64
"""Tokens that are read at once where the KV cache is packed."""
RESQ = SVDQConfig.resq()
WHOLE = RESQ.replace(subspace=0.0)
"""The same without a subspace: 4 bits everywhere."""


def random_axes(covariance: torch.Tensor) -> torch.Tensor:
    """Axes `[..., n, n]` that nothing is known of."""
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randn(covariance.shape, dtype=torch.float64, generator=generator)
    return torch.linalg.qr(drawn)[0]


class Row(NamedTuple):
    """A method: what it is called, its config, its axes, and the rotations that it leaves out."""

    title: str
    config: SVDQConfig | None
    axes: Callable[[torch.Tensor], torch.Tensor] | None = None
    data: bool = True
    without: str = ""
    cache: float | None = None
    """Bits of the KV cache; None: it is not packed."""


ROWS = {
    "16": Row("16 bits", None),
    "w4": Row("W4, activations exact", SVDQConfig(k=0)),
    "rounding": Row("W4A4, rounding alone", WHOLE),
    "quarot": Row("W4A4, random rotation (QuaRot-like)", WHOLE, principal_axes, data=False),
    "random": Row("an eighth in 8 bits, random axes", RESQ, random_axes, data=False),
    "channels": Row(
        "an eighth in 8 bits, channels, not rotated (QUIK-like)", RESQ, channel_axes, without="R"
    ),
    "quik": Row("an eighth in 8 bits, channels, rotated", RESQ, channel_axes),
    "resq": Row("ResQ, axes from data", RESQ, principal_axes),
    "resq-feedback": Row(
        "ResQ, axes from data, error feedback", RESQ.replace(error_feedback=True), principal_axes
    ),
    "kv": Row("KV cache in 4.5 bits, all else exact", None, cache=4.5),
    "resq-kv": Row("ResQ, axes from data, KV cache in 4.5 bits", RESQ, principal_axes, cache=4.5),
    "resq-weights": Row("ResQ, axes from weights", RESQ, principal_axes, data=False),
    "no-U_D": Row("ResQ without U_D", RESQ, principal_axes, without="D"),
    "no-U_A": Row("ResQ without U_A", RESQ, principal_axes, without="A"),
    "no-U_B": Row("ResQ without U_B", RESQ, principal_axes, without="B"),
}


def covariances(dense: Any, batches: list[Any]) -> Covariances:
    """Of a model's vectors on calibration batches."""
    model = copy.deepcopy(dense)
    stream = find_stream(model)
    fold_norms(model, stream)
    return seen_covariances(model, stream, batches)


def quantized(row: Row, model: Any, data: Covariances | None, batches: list[Any]) -> Any:
    """A model, quantized as a row says."""
    if row.config is None:
        return model
    if row.axes is None:
        return svdq_hf.quantize_model(model, row.config) if row.config.activations is None else _alone(model)
    stream = find_stream(model)
    fold_norms(model, stream)
    seen = data if row.data and data else weight_covariances(model, stream)
    rotate(model, stream, _without(row, bases_of(seen, row.config.subspace, row.config.seed, row.axes), seen))
    inputs = layer_inputs(model, stream)
    if row.without in ("D", "R"):
        inputs = {name: one for name, one in inputs.items() if one != "hadamard"}
    config = row.config.replace(layer_inputs=inputs)
    convert_layers(model, config, batches if config.data_needs else None)
    return model


def _alone(model: Any) -> Any:
    convert_layers(model, WHOLE)
    return model


def _without(row: Row, bases: Bases, seen: Covariances) -> Bases:
    """The bases that a row really takes."""
    if row.without == "R":  # the channels, in order: no random rotations
        return Bases(
            channel_axes(seen.stream), {name: channel_axes(one) for name, one in seen.values.items()}
        )
    bases = replace(bases, stream=None) if row.without == "A" else bases
    return replace(bases, values={}) if row.without == "B" else bases


def windows_of(text: str, tokenizer: Any, count: int, length: int) -> list[torch.Tensor]:
    """Token ids `[1, length]`, their starts spread evenly over a text."""
    ids = tokenizer(text, verbose=False)["input_ids"]
    starts = [number * (len(ids) - length) // count for number in range(count)]
    return [torch.tensor([ids[start : start + length]]) for start in starts]


@torch.no_grad()
def log_probabilities(
    model: Any, windows: list[torch.Tensor], cache_bits: float | None = None
) -> list[torch.Tensor]:
    """Of the next token, `[length, vocabulary]` for each window; cache_bits: of the KV cache."""
    return [torch.log_softmax(_logits(model, one, cache_bits).float(), -1) for one in windows]


def _logits(model: Any, ids: torch.Tensor, cache_bits: float | None) -> torch.Tensor:
    if cache_bits is None:
        return model(input_ids=ids).logits[0]
    cache = {cache_keyword(): svdq_hf.SVDQCache(model, cache_bits, recent=0)}
    return torch.cat([model(input_ids=part, **cache).logits[0] for part in ids.split(FED, 1)])


def loss(found: list[torch.Tensor], windows: list[torch.Tensor]) -> float:
    """Mean loss in nats a token."""
    each = [-one[:-1].gather(1, ids[0, 1:, None]).mean() for one, ids in zip(found, windows, strict=True)]
    return float(torch.stack(each).mean())


def divergence(exact: list[torch.Tensor], found: list[torch.Tensor]) -> float:
    """Mean KL divergence in nats a token."""
    each = [(p.exp() * (p - q)).sum(-1).mean() for p, q in zip(exact, found, strict=True)]
    return float(torch.stack(each).mean())


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="folder of a dense model that can be rotated, with its tokenizer")
    parser.add_argument("--text", required=True, help="what the methods are compared on")
    parser.add_argument("--calibration", required=True, help="another text, for rows that read data")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512, help="tokens of a window")
    parser.add_argument("--samples", type=int, default=32, help="calibration windows of 512 tokens")
    parser.add_argument("--json", help="file for the figures; rows that are there already stay")
    return parser.parse_args()


def main() -> None:
    """Print a row for each method."""
    given = options()
    hf.utils.logging.disable_progress_bar()
    dense = hf.AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32).eval()
    tokenizer = hf.AutoTokenizer.from_pretrained(given.model)
    windows = windows_of(read_text(given.text), tokenizer, given.windows, given.length)
    batches = text_batches(given.calibration, given.model, dense, samples=given.samples)
    exact = log_probabilities(dense, windows)
    read = any(ROWS[name].data and ROWS[name].axes for name in given.rows)
    data = covariances(dense, batches) if read else None
    figures: dict[str, Any] = {}
    if given.json and Path(given.json).is_file():
        figures = json.loads(Path(given.json).read_text())
    print(f"{'':56}{'KL':>8}{'loss':>9}{'bits':>7}{'s':>6}")
    for name in given.rows:
        row, started = ROWS[name], time.process_time()
        model = quantized(row, copy.deepcopy(dense), data, batches)
        found = log_probabilities(model, windows, row.cache)
        kl, more = divergence(exact, found), loss(found, windows) - loss(exact, windows)
        bits = svdq_hf.footprint(model).bits_per_weight or 16.0
        seconds = time.process_time() - started
        print(f"{row.title:56}{kl:8.4f}{more:+9.4f}{bits:7.2f}{seconds:6.0f}", flush=True)
        figures[name] = {"title": row.title, "kl": kl, "loss": more, "bits": bits, "seconds": seconds}
        if given.json:
            Path(given.json).write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
