"""`svdq bench`: how fast a model is on this machine, and in how much memory, beside the same model dense.

Not here: the measuring (`evaluation.speed`), the tables (`cli.bench_tables`).
"""

import argparse
import sys
from typing import Any

from svdq_hf.cli.options import add_choices, config_of, examples
from svdq_hf.config.choices import CHOICES

WORDS = ("svdq", "fp32", "bf16", "nf4", "int4")
"""Variants, as `evaluation.speed.variants` names them."""


def add(commands: Any) -> argparse.ArgumentParser:
    """Add the command's parser to those of `svdq`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "bench",
        help="how fast a model is on this machine, quantized and dense, and in what memory",
        **examples("svdq bench minilm-4bit", "svdq bench MODEL --preset small --tokens 64"),
    )
    parser.add_argument(
        "folder", help="a model's folder, or the Hub's user/model; a dense model is quantized on the way"
    )
    parser.add_argument("--dense", metavar="FOLDER", help="the dense model, where FOLDER is quantized")
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[8, 64, 512], metavar="N",
        help="lengths of a prompt (8 64 512); decoding is measured besides",
    )  # fmt: skip
    parser.add_argument(
        "--seconds", type=float, default=40, metavar="S",
        help="how long rounds are begun after loading; at least one is (40)",
    )  # fmt: skip
    parser.add_argument("--only", nargs="+", choices=WORDS, default=[], help="variants; default: all")
    parser.add_argument("--threads", type=int, metavar="N", help="of torch; default: as torch takes them")
    add_choices(parser, "demo")
    return parser


def run(options: argparse.Namespace) -> dict[str, object]:
    """Measure and print; returns what `--json` prints.

    Args:
        options: the parsed command line.

    Raises:
        ValueError: choices of a quantization for a model that is quantized already; see `run_bench`.
    """
    from svdq_hf.checkpoint.source import Source
    from svdq_hf.evaluation.speed.bench import BenchRequest, run_bench

    given = [name for name in ("preset", *CHOICES) if getattr(options, name, None) is not None]
    source = Source.resolve(options.folder)
    if given and "quantization_config" in source.stored:
        raise ValueError(f"{', '.join(given)}: {options.folder} is quantized already; leave that out")
    request = BenchRequest(
        options.folder, options.dense, config_of(options), options.tokens, options.seconds, options.only,
        options.threads,
    )  # fmt: skip
    result = run_bench(request, _silent if options.quiet else _say)
    if not options.json:
        from svdq_hf.cli.bench_tables import show_bench

        show_bench(result)
    return result.to_dict()


def _say(text: str) -> None:
    print(f"{text} ...", file=sys.stderr, flush=True)


def _silent(text: str) -> None:
    """What is said with `--json`: nothing."""
