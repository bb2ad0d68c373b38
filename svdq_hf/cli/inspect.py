"""`svdq inspect`: what a quantized folder holds, layer by layer."""

import argparse
from typing import Any


def add(commands: Any) -> argparse.ArgumentParser:
    """The command's parser, added to those of `svdq`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "inspect", help="what a quantized folder holds, layer by layer"
    )
    parser.add_argument("folder")
    return parser


def run(options: argparse.Namespace) -> dict[str, object]:
    """Read the files' headers and tell what they hold."""
    from svdq_hf.cli.tables import console, layer_table, totals_table
    from svdq_hf.quantize.footprint import read_footprint

    result = read_footprint(options.folder)
    if not options.json:
        screen = console()
        screen.print(layer_table(result))
        screen.print(totals_table(result))
    return result.to_dict()
