"""`svdq push`: uploads a quantized folder to the Hub.

Not here: the upload itself (`hub.push`).
"""

import argparse
import sys
from typing import Any

from svdq_hf.cli.options import examples


def add(commands: Any) -> argparse.ArgumentParser:
    """Add the command's parser to those of `svdq`."""
    shown = examples("svdq push FOLDER user/model", "svdq push FOLDER user/model --private")
    parser: argparse.ArgumentParser = commands.add_parser(
        "push", help="a quantized folder -> the Hub", **shown
    )
    parser.add_argument("folder", help="a quantized model's folder, its tokenizer beside it")
    parser.add_argument("repo_id", metavar="user/model", help="its name on the Hub")
    parser.add_argument("--private", action="store_true", default=None, help="a new repository is private")
    parser.add_argument("--replace", action="store_true", help="give up another model that is there")
    parser.add_argument("--revision", help="branch to push to")
    base = "name on the Hub of the model that was quantized, for the card"
    parser.add_argument("--base-model", metavar="user/model", help=base)
    return parser


def run(options: argparse.Namespace) -> dict[str, object]:
    """Push, and print the address; returns what `--json` prints."""
    from svdq_hf.format.files import check_is_folder  # it imports safetensors

    check_is_folder(options.folder)
    from svdq_hf.hub.push import push_folder
    from svdq_hf.hub.readme import NO_BASE, names_base

    url = push_folder(
        options.folder,
        options.repo_id,
        private=options.private,
        revision=options.revision,
        replace=options.replace,
        base_model=options.base_model,
    )
    if not options.json:
        print(url)
        if not names_base(options.folder):
            print(f"svdq push: {NO_BASE}", file=sys.stderr)
    return {"url": url}
