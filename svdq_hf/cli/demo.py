"""`svdq demo`: quantize the embedded all-MiniLM-L6-v2, save, reload and compare.

Not here: the work itself (`svdq_hf.demo`).
"""

import argparse
from typing import TYPE_CHECKING, Any

from svdq_hf.cli.options import add_choices, config_of, examples

if TYPE_CHECKING:
    from svdq_hf.config import SVDQConfig
    from svdq_hf.demo import DemoResult

MEGABYTE = 10**6


def add(commands: Any) -> argparse.ArgumentParser:
    """Add the command's parser to those of `svdq`."""
    shown = examples("svdq demo", "svdq demo --out minilm-4bit --embeddings")
    parser: argparse.ArgumentParser = commands.add_parser(
        "demo", help="the whole round on the embedded all-MiniLM-L6-v2", **shown
    )
    parser.add_argument("--out", help="folder to keep the quantized model in")
    add_choices(parser, "demo")
    return parser


def run(options: argparse.Namespace) -> dict[str, object]:
    """Run the demo and print what it measured.

    Args:
        options: the parsed command line.

    Returns:
        The result, as `--json` prints it.

    Raises:
        RuntimeError: the reloaded model differs from the saved one.
    """
    config = config_of(options)
    from svdq_hf.checkpoint.quantize import check_names
    from svdq_hf.demo import default_model, run_demo

    check_names(default_model(), config)
    result = run_demo(config, options.out)
    if not options.json:
        _show(result, config)
    if not result.reload_equal:
        raise RuntimeError("the reloaded model differs from the saved one")
    return result.to_dict()


def _show(result: "DemoResult", config: "SVDQConfig") -> None:
    from svdq_hf.cli.tables import console, sentences_table

    dense = "" if config.embeddings else "; embeddings stay FP32, --embeddings quantizes them too"
    screen = console()
    screen.print(sentences_table(result))
    screen.print(
        f"embeddings, cosine to FP32: {result.embedding_cosine:.4f}; "
        f"reloaded model equal bit for bit: {'yes' if result.reload_equal else 'NO'}\n"
        f"{result.bytes_fp32 / MEGABYTE:.1f} MB -> {result.bytes_svdq / MEGABYTE:.1f} MB "
        f"({result.bits_per_weight:.2f} bits per weight in what is quantized{dense}); "
        f"loaded and quantized in {result.load_seconds:.1f} s"
    )
