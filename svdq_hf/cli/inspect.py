"""`svdq inspect`: shows what a quantized folder holds, layer by layer.

Not here: reading the files (`quantize.footprint`).
"""

import argparse
from typing import Any

from svdq_hf.cli.options import check_there, examples


def add(commands: Any) -> argparse.ArgumentParser:
    """Add the command's parser to those of `svdq`."""
    shown = examples("svdq inspect minilm-4bit")
    parser: argparse.ArgumentParser = commands.add_parser(
        "inspect", help="what a quantized folder holds, layer by layer", **shown
    )
    parser.add_argument("folder", help="a quantized model's folder")
    return parser


def run(options: argparse.Namespace) -> dict[str, object]:
    """Print what the headers of the files say; returns what `--json` prints."""
    check_there(options.folder)
    from svdq_hf.cli.tables import console, layer_table, totals_table
    from svdq_hf.quantize.footprint import read_footprint

    result = read_footprint(options.folder)
    if not options.json:
        screen = console()
        screen.print(layer_table(result))
        screen.print(totals_table(result))
    return result.to_dict()
