"""`svdq sensitivity`: what rounding each layer of a model costs its loss on a text, a table.

Not here: the measuring (`quantize.sensitivity`), and the score that follows it, `--saliency pqi` of
`svdq quantize`.
"""

import argparse
import math
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from svdq_hf.cli.options import add_choices, check_there, config_of, examples
from svdq_hf.config.choices import part_of_grid

if TYPE_CHECKING:
    from rich.table import Table

    from svdq_hf.quantize.sensitivity import Sensitivity

COPIES = 2
"""Of the weights in float32: the model, and a term for each weight."""
SHOWN = 12
"""Layers in the table: those that cost most."""


def add(commands: Any) -> argparse.ArgumentParser:
    """Add the command's parser to those of `svdq`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "sensitivity",
        help="what rounding each layer costs a model's loss on a text (PQI)",
        **examples(
            "svdq sensitivity MODEL --text notes.txt", "svdq sensitivity MODEL --text notes.txt --bits 3"
        ),
    )
    add = parser.add_argument
    add("model", help="a dense causal language model: a folder, or the Hub's user/model")
    add("--text", required=True, metavar="FILE", help="a text of the kind that the model will read")
    add("--samples", type=int, default=8, metavar="N", help="windows of it, spread evenly (8)")
    add("--length", type=int, default=256, metavar="L", help="tokens of a window (256)")
    add("--steps", type=int, default=8, metavar="N", help="points of the integral (8)")
    add("--top", type=int, default=SHOWN, metavar="N", help=f"layers that are shown ({SHOWN})")
    add_choices(parser, "quantize", only=(*part_of_grid(), "modules_to_not_convert"))
    return parser


def run(options: argparse.Namespace) -> dict[str, object]:
    """Measure, and print a table; returns what `--json` prints.

    Args:
        options: the parsed command line.

    Raises:
        ValueError: the model is quantized or no causal one, or the text or a number cannot be used.
    """
    if options.top < 1:
        raise ValueError(f"--top {options.top}: must be 1 or more")
    check_there(options.model)
    config = config_of(options)
    model, batches = _loaded(options)
    from svdq_hf.quantize.sensitivity import sensitivity

    found = sensitivity(model, batches, config, steps=options.steps)
    if not options.json:
        from svdq_hf.cli.tables import console

        screen = console()
        screen.print(_layers(found, options.top))
        screen.print(_kinds(found))
        screen.print(_totals(found), markup=False)
    return found.to_dict()


def _loaded(options: argparse.Namespace) -> tuple[Any, list[Any]]:
    """The dense model in FP32, and the windows of the text."""
    import torch
    from transformers import AutoModelForCausalLM

    from svdq_hf.calibration.texts import text_batches
    from svdq_hf.checkpoint.load import load_complete
    from svdq_hf.checkpoint.source import Source
    from svdq_hf.evaluation.speed.memory import check_fits

    source = Source.resolve(options.model)
    if not source.empty.can_generate() or getattr(source.empty.config, "is_encoder_decoder", False):
        raise ValueError(
            f"{options.model}: is no causal language model, whose loss a text alone gives; for others call "
            "svdq_hf.sensitivity(model, batches) with labels in the batches"
        )
    sizes = {"samples": options.samples, "length": options.length}
    check_fits(options.model, sum(math.prod(place.shape) for place in source.places.values()), COPIES)
    batches = text_batches(options.text, source.folder, source.empty, **sizes)
    model, _ = load_complete(AutoModelForCausalLM, source.folder, dtype=torch.float32)
    return model, batches


def _layers(found: "Sensitivity", top: int) -> "Table":
    """The layers that cost most."""
    from svdq_hf.cli.tables import plain

    table = _table("layers that cost most", "layer", "PQI", "Taylor", "0.5 % hold")
    for layer in found.layers[:top]:
        figures = f"{layer.pqi:+.5f}", f"{layer.first_order:+.5f}", f"{layer.top_share:.0%}"
        table.add_row(plain(layer.name), *figures)
    return table


def _kinds(found: "Sensitivity") -> "Table":
    """Sums over the layers of one name, such as down_proj."""
    sums: dict[str, list[float]] = defaultdict(list)
    for layer in found.layers:
        sums[layer.name.rpartition(".")[2]].append(layer.pqi)
    table = _table("by kind of layer", "name", "layers", "PQI")
    for name, costs in sorted(sums.items(), key=lambda item: -sum(item[1])):
        table.add_row(name, str(len(costs)), f"{sum(costs):+.5f}")
    return table


def _table(title: str, first: str, *others: str) -> "Table":
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title, box=SIMPLE_HEAD)
    table.add_column(first, overflow="fold")
    for name in others:
        table.add_column(name, justify="right")
    return table


def _totals(found: "Sensitivity") -> str:
    return (
        f"rounding all layers changes the loss by {found.change:+.4f} nats, from {found.dense_loss:.4f}; PQI "
        f"in {found.steps} steps sums to {found.predicted:+.4f}, the first-order Taylor term to "
        f"{found.first_order:+.4f}"
    )
