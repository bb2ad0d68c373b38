"""`svdq inspect`: shows what a quantized folder holds, layer by layer.

Not here: reading the files (`quantize.footprint`).
"""

import argparse
from typing import Any


def add(commands: Any) -> argparse.ArgumentParser:
    """Add the command's parser to those of `svdq`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "inspect", help="what a quantized folder holds, layer by layer"
    )
    parser.add_argument("folder", help="a quantized model's folder")
    return parser


def run(options: argparse.Namespace) -> dict[str, object]:
    """Print what the headers of the files say; returns what `--json` prints."""
    from svdq_hf.cli.tables import console, layer_table, totals_table
    from svdq_hf.quantize.footprint import read_footprint

    result = read_footprint(options.folder)
    if not options.json:
        screen = console()
        screen.print(layer_table(result))
        screen.print(totals_table(result))
    return result.to_dict()
