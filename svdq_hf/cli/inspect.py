"""`svdq inspect`: what a quantized folder holds, the totals first and then its layers; or how two differ.

Not here: reading the files (`quantize.footprint`), comparing them (`checkpoint.difference`).
"""

import argparse
from typing import TYPE_CHECKING, Any

from svdq_hf.cli.options import examples

if TYPE_CHECKING:
    from svdq_hf.quantize.footprint import LayerFootprint

TOP = 10
SORTS = ("error", "bits", "size", "name")


def add(commands: Any) -> argparse.ArgumentParser:
    """Add the command's parser to those of `svdq`."""
    shown = examples(
        "svdq inspect minilm-4bit",
        "svdq inspect user/model --sort bits --all",
        "svdq inspect minilm-4bit minilm-3bit",
    )
    parser: argparse.ArgumentParser = commands.add_parser(
        "inspect", help="what a quantized folder holds, layer by layer; how two differ", **shown
    )
    add = parser.add_argument
    add("folder", help="a quantized model's folder, or the Hub's user/model")
    add("other", nargs="?", help="another one, to compare with")
    add("--top", type=int, default=TOP, metavar="N", help=f"layers that are shown, the worst first ({TOP})")
    add("--sort", choices=SORTS, default="error", help="by relative error, bits, size or name (error)")
    add("--all", action="store_true", help="show every layer")
    return parser


def run(options: argparse.Namespace) -> dict[str, object]:
    """Print what the headers of the files say; returns what `--json` prints.

    Args:
        options: the parsed command line.

    Raises:
        ValueError: a number of layers below 1; a folder that holds no quantized model.
    """
    if options.top < 1:
        raise ValueError(f"--top {options.top}: must be 1 or more")
    from svdq_hf.hub.client import local_folder

    folder = local_folder(options.folder)
    if options.other is not None:
        return _compared(folder, local_folder(options.other), options)
    from svdq_hf.cli.tables import console, layer_table, totals_table
    from svdq_hf.quantize.footprint import read_footprint

    result = read_footprint(folder)
    if not options.quiet:
        screen = console()
        screen.print(totals_table(result))
        layers = sorted(result.layers, key=order(options.sort))
        shown = layers if options.all else layers[: options.top]
        screen.print(layer_table(shown, screen.width, how=_how(options, len(layers))))
    return result.to_dict()


def _compared(folder: Any, other: Any, options: argparse.Namespace) -> dict[str, object]:
    from svdq_hf.checkpoint.difference import folder_difference
    from svdq_hf.cli.difference_tables import changes_table, layers_table
    from svdq_hf.cli.tables import console

    result = folder_difference(folder, other)
    if not options.quiet:
        screen = console()
        screen.print(changes_table(result))
        screen.print(layers_table(result, None if options.all else options.top))
    return result.to_dict()


def _how(options: argparse.Namespace, count: int) -> str:
    """Title of the table of layers: how many of them, in which order."""
    by = {"error": "largest relative error", "bits": "most bits", "size": "largest", "name": "by name"}
    if options.all or count <= options.top:
        return f"all {count} quantized layers, {by[options.sort]}{' first' * (options.sort != 'name')}"
    return f"{options.top} of {count} quantized layers: {by[options.sort]} (--all shows all)"


def order(sort: str) -> Any:
    """The key that sorts layers, the worst first; by name they stay in the model's order.

    Args:
        sort: one of `SORTS`.
    """

    def value(layer: "LayerFootprint") -> float:
        measures = {
            "error": layer.facts.get("relative_error", 0.0),
            "bits": layer.bits_per_weight,
            "size": layer.stored_bytes,
            "name": 0,
        }
        return -measures[sort]

    return value
