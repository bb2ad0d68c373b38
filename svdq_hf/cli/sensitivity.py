"""`svdq sensitivity`: what rounding each layer of a model costs its loss on a text, as table and heat map.

Not here: the measuring (`quantize.sensitivity`, `quantize.score_agreement`), the picture
(`evaluation.sensitivity_picture`), and the scores that follow it, `--saliency pqi` or requant, of
`svdq quantize`.
"""

import argparse
import math
from collections import defaultdict
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from svdq_hf.cli.options import add_choices, check_there, config_of, examples
from svdq_hf.cli.pictures import check_picture, write_picture
from svdq_hf.config.choices import COMPUTE_DTYPES, part_of_grid

if TYPE_CHECKING:
    from rich.table import Table

    from svdq_hf.quantize.score_agreement import ScoreAgreement
    from svdq_hf.quantize.sensitivity_result import Sensitivity

PACKED = 1.15
"""The model and its rounded weights, packed, over the model alone."""
SHOWN = 12
"""Layers in the table: those that cost most."""


def add(commands: Any) -> argparse.ArgumentParser:
    """Add the command's parser to those of `svdq`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "sensitivity",
        help="what rounding each layer costs a model's loss on a text (PQI)",
        **examples(
            "svdq sensitivity MODEL --text notes.txt",
            "svdq sensitivity MODEL --text notes.txt --bits 3 --scores --out costs.svg",
        ),
    )
    add = parser.add_argument
    add("model", help="a dense causal language model: a folder, or the Hub's user/model")
    add("--text", required=True, metavar="FILE", help="a text of the kind that the model will read")
    add("--samples", type=int, default=8, metavar="N", help="windows of it, spread evenly (8)")
    add("--length", type=int, default=256, metavar="L", help="tokens of a window (256)")
    add("--steps", type=int, default=8, metavar="N", help="points of the integral (8)")
    add("--top", type=int, default=SHOWN, metavar="N", help=f"layers that are shown ({SHOWN})")
    add("--scores", action="store_true", help="also tell which other scores find the weights that cost most")
    add("--rows", action="store_true", help="with --json, also the sum of each row of each matrix")
    add("--out", metavar="FILE", help="an .svg file to write a heat map to, by layer and kind of matrix")
    dtype = "the model computes in (float32; in bfloat16 it takes half of the memory, its loss is coarser)"
    add("--dtype", choices=COMPUTE_DTYPES, default="float32", help=dtype)
    add_choices(parser, "quantize", only=(*part_of_grid(), "modules_to_not_convert"))
    return parser


def run(options: argparse.Namespace) -> dict[str, object]:
    """Measure, print tables and draw a picture; returns what `--json` prints.

    Args:
        options: the parsed command line.

    Raises:
        ValueError: the model is quantized or no causal one, or the text, a number or --out cannot be used.
    """
    _check(options)
    config = config_of(options)
    model, batches = _loaded(options)
    from svdq_hf.quantize.score_agreement import score_agreement
    from svdq_hf.quantize.sensitivity import linear, sensitivity

    found = sensitivity(model, batches, config, steps=options.steps)
    layers = linear(model, config)
    scores = score_agreement(model, layers, config, batches) if options.scores else []
    if not options.json:
        _print(found, scores, options.top)
    if options.out is not None:
        _draw(found, options.out)
    told = found.to_dict(rows=options.rows)
    return told | {"scores": [asdict(row) for row in scores], "picture": options.out}


def _check(options: argparse.Namespace) -> None:
    """Refuse what cannot work before a model is loaded."""
    if options.top < 1:
        raise ValueError(f"--top {options.top}: must be 1 or more")
    check_picture(options.out)
    if options.rows and not options.json:
        raise ValueError("--rows is of --json, which is not given")
    check_there(options.model)


def _loaded(options: argparse.Namespace) -> tuple[Any, list[Any]]:
    """The dense model, and the windows of the text."""
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
    weights = sum(math.prod(place.shape) for place in source.places.values())
    check_fits(options.model, int(PACKED * weights), options.dtype)
    batches = text_batches(options.text, source.folder, source.empty, **sizes)
    model, _ = load_complete(AutoModelForCausalLM, source.folder, dtype=getattr(torch, options.dtype))
    return model, batches


def _draw(found: "Sensitivity", out: str) -> None:
    """Write the heat map; layers in the model's order."""
    from svdq_hf.evaluation.sensitivity_picture import sensitivity_picture

    costs = {layer.name: layer.pqi for layer in found.layers}
    write_picture(sensitivity_picture({name: costs[name] for name in found.terms}), out)


def _print(found: "Sensitivity", scores: "list[ScoreAgreement]", top: int) -> None:
    from svdq_hf.cli.tables import console

    screen = console()
    screen.print(_layers(found, top))
    screen.print(_kinds(found))
    if scores:
        screen.print(_scores(scores))
    screen.print(_totals(found), markup=False)


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


def _scores(scores: "list[ScoreAgreement]") -> "Table":
    """What other scores say of the same weights."""
    table = _table("do they find PQI's first 0.5 %?", "score", "overlap", "rank correlation")
    for row in scores:
        table.add_row(row.name, f"{row.overlap:.1%}", f"{row.correlation:+.2f}")
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
