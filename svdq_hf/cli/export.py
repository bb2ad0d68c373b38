"""`svdq export`: a quantized folder -> a dense checkpoint for other engines.

Not here: the work itself (`checkpoint.export`).
"""

import argparse
from typing import Any

from svdq_hf.cli.options import add_drop, check_there, examples
from svdq_hf.config.choices import COMPUTE_DTYPES

MEGABYTE = 10**6


def add(commands: Any) -> argparse.ArgumentParser:
    """Add the command's parser to those of `svdq`."""
    shown = examples("svdq export minilm-4bit minilm-dense", "svdq export FOLDER OUT --dtype float16")
    parser: argparse.ArgumentParser = commands.add_parser(
        "export", help="a quantized folder -> a plain checkpoint for other engines", **shown
    )
    parser.add_argument("folder", help="a quantized folder, or the Hub's user/model")
    parser.add_argument("out", help="folder to write; must not be there, or be empty")
    to = "a Hugging Face checkpoint of dense weights; llama.cpp's converter to GGUF reads it as it is"
    parser.add_argument("--to", choices=("dense",), default="dense", help=to)
    parser.add_argument(
        "--dtype", choices=COMPUTE_DTYPES, default="bfloat16", help="of the weights (bfloat16)"
    )
    add_drop(parser)
    return parser


def run(options: argparse.Namespace) -> dict[str, object]:
    """Export, and print the size; returns what `--json` prints."""
    check_there(options.folder)
    from svdq_hf.checkpoint import Source, export_dense

    source = Source.resolve(options.folder, drop=options.drop, packed=True)
    size = export_dense(source, options.out, options.dtype)
    if not options.json:
        print(f"{options.out}: {size / MEGABYTE:.1f} MB, dense, {options.dtype}")
    return {"bytes": size}
