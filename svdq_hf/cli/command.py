"""The command `svdq`: quantize, inspect, evaluate, lm-eval, export, push, demo. It parses, calls and prints.

Exit codes: 0 done, 1 refused or failed (one line on standard error says why), 2 wrong usage, 130 interrupted.
SVDQ_TRACEBACK=1 in the environment shows where an error comes from as well.
"""

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table
from safetensors import SafetensorError
from transformers.utils import logging as hf_logging

from svdq_hf import __version__
from svdq_hf.checkpoint.estimate import estimate_checkpoint
from svdq_hf.checkpoint.export import DTYPES, export_dense
from svdq_hf.checkpoint.folders import SHARD_SIZE
from svdq_hf.checkpoint.quantize import check_names, quantize_source
from svdq_hf.checkpoint.source import Source
from svdq_hf.cli import evaluate as command_line
from svdq_hf.cli import lm_eval as harness
from svdq_hf.cli.tables import console, estimate_table, layer_table, totals_table
from svdq_hf.config import SVDQConfig
from svdq_hf.demo import SENTENCES, DemoResult, default_model, run_demo
from svdq_hf.hub.push import push_folder
from svdq_hf.quantize.footprint import read_footprint

MEGABYTE = 10**6
HARNESS = "lm-eval"
TRACEBACK = "SVDQ_TRACEBACK"
"""The environment variable that asks for one."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if list(arguments[:1]) == [HARNESS]:
        return _harness(arguments[1:])
    options = _parser().parse_args(arguments)
    follows = os.environ.get("RANK", "0") != "0"  # of `accelerate launch`: the first process speaks
    options.quiet = options.json or follows
    if options.quiet or sys.stderr is None or not sys.stderr.isatty():  # None: closed by `2>&-`
        hf_logging.disable_progress_bar()
    try:
        result: dict[str, object] = options.run(options)
    except KeyboardInterrupt:
        print(f"svdq {options.command}: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if os.environ.get(TRACEBACK) == "1":
            traceback.print_exc()
        print(f"svdq {options.command}: {_explained(error, options)}", file=sys.stderr)
        _print(None)
        return 1
    failure = _print(result if options.json and not follows else None)
    if failure is None:
        return 0
    if not isinstance(failure, BrokenPipeError):  # of `svdq ... | head`, which has seen enough
        print(f"svdq {options.command}: {failure}", file=sys.stderr)
    return 1


def _explained(error: Exception, options: argparse.Namespace) -> str:
    """What went wrong in one line, and the remedy where the error does not say it."""
    text = " ".join(str(error).split())
    if isinstance(error, ModuleNotFoundError) and options.command == "evaluate":
        return f"{text}; evaluating needs more packages: pip install 'svdq_hf[evaluate]'"
    told = (ValueError, OSError, ImportError, SafetensorError, RuntimeError)
    if isinstance(error, told) and not isinstance(error, RecursionError):
        return text
    # Nobody has foreseen this one: mostly it is transformers, of a config.json that says nonsense.
    folder = getattr(options, "model", None) or getattr(options, "folder", None)
    cause = f"{folder}'s config.json or files may be damaged; " if folder else ""
    return f"{type(error).__name__}: {text} ({cause}{TRACEBACK}=1 shows where)"


def _print(result: dict[str, object] | None) -> OSError | None:
    """Print a result as JSON, and all that was printed before; returns why that cannot be written."""
    if sys.stdout is None:  # closed by `>&-`
        return None
    try:
        if result is not None:
            print(json.dumps(result, indent=1))
        sys.stdout.flush()
    except OSError as error:  # the null device takes what is left when Python ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return error
    return None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="svdq", description="Data-free low-bit quantization for Transformers.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"svdq_hf {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    quantize = commands.add_parser(
        "quantize", allow_abbrev=False, help="a model -> a folder with the quantized model"
    )
    quantize.add_argument("model", help="a folder, or the Hub's user/model")
    quantize.add_argument("out", help="folder to write; must not be there, or be empty")
    _add_config(quantize)
    help_feedback = (
        "later columns make good what rounding lost; the model makes the batches, which takes minutes"
    )
    quantize.add_argument(
        "--error-feedback", choices=("synthetic",), default=argparse.SUPPRESS, help=help_feedback
    )
    _add_work(quantize)
    _add_drop(quantize)
    quantize.set_defaults(run=_quantize)
    inspect = commands.add_parser(
        "inspect", allow_abbrev=False, help="what a quantized folder holds, layer by layer"
    )
    inspect.add_argument("folder")
    inspect.set_defaults(run=_inspect)
    export = commands.add_parser(
        "export", allow_abbrev=False, help="a quantized folder -> a plain checkpoint for other engines"
    )
    export.add_argument("folder", help="a quantized folder, or the Hub's user/model")
    export.add_argument("out", help="folder to write; must not be there, or be empty")
    help_to = "a Hugging Face checkpoint of dense weights; llama.cpp's converter to GGUF reads it as it is"
    export.add_argument("--to", choices=("dense",), default="dense", help=help_to)
    export.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the weights (bfloat16)")
    _add_drop(export)
    export.set_defaults(run=_export)
    help_harness = "EleutherAI's harness, which takes all that follows: svdq lm-eval run --model hf ..."
    commands.add_parser(HARNESS, allow_abbrev=False, help=help_harness)
    push = commands.add_parser("push", allow_abbrev=False, help="a quantized folder -> the Hub")
    push.add_argument("folder")
    push.add_argument("repo_id", metavar="user/model")
    push.add_argument("--private", action="store_true", default=None, help="a new repository is private")
    push.add_argument("--replace", action="store_true", help="give up another model that is there")
    push.add_argument("--revision", help="branch to push to")
    push.set_defaults(run=_push)
    demo = commands.add_parser(
        "demo", allow_abbrev=False, help="the whole round on the embedded all-MiniLM-L6-v2"
    )
    demo.add_argument("--out", help="folder to keep the quantized model in")
    _add_config(demo)
    demo.set_defaults(run=_demo)
    evaluate = commands.add_parser(
        "evaluate",
        allow_abbrev=False,
        help="what quantizing costs: GLUE or perplexity, a report",
        epilog=f"example: {command_line.EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command_line.add_arguments(evaluate)
    evaluate.set_defaults(run=_evaluate)
    for command in (quantize, inspect, export, push, demo, evaluate):
        command.add_argument("--json", action="store_true", help="print JSON instead of tables")
    return parser


def _add_config(command: argparse.ArgumentParser) -> None:
    """The choices of SVDQConfig; its own defaults hold where an option is not given."""
    add = command.add_argument_group("choices").add_argument
    missing = argparse.SUPPRESS
    help_preset = "start from a preset: best (4.5 bits), small (4.28) or paper"
    add("--preset", choices=("best", "small", "paper"), help=help_preset)
    add(
        "--k", type=command_line.number, default=missing, help="salient weights per layer, or a share below 1"
    )
    help_bits = "stored bits per weight, spent layer by layer instead of k"
    add("--target-bits", type=float, default=missing, help=help_bits)
    add("--rank", type=int, default=missing, help="rank of the principal structure")
    add("--bits", type=int, default=missing, help="of a weight that is not salient: 4, 3 or 8")
    add("--saliency", default=missing, help="score that picks them: svd, magnitude, relative, random")
    add("--group-size", type=_group_size, default=missing, help="columns per scale, 'row' or 'tensor'")
    add("--scale", default=missing, help="mse, absmax or sigma")
    add("--levels", default=missing, help="what codes stand for: normal or linear")
    column_scale = argparse.BooleanOptionalAction
    add("--column-scale", action=column_scale, default=missing, help="a scale for each column as well")
    add("--scale-bits", type=int, default=missing, help="of a group's scale: 8 or 16")
    add("--lm-head", action="store_true", default=missing, help="quantize the output head as well")
    help_embeddings = "quantize the input embedding as well"
    add("--embeddings", action="store_true", default=missing, help=help_embeddings)
    add("--seed", type=int, default=missing)
    add("--clip-sigma", type=float, default=missing, help="where sigma clips, in standard deviations")
    add("--compute-dtype", default=missing, help="float32, bfloat16 or float16")
    help_skip = "module to keep dense; may be given again"
    add("--skip", action="append", default=missing, dest="modules_to_not_convert", help=help_skip)


def _add_drop(command: argparse.ArgumentParser) -> None:
    help_drop = "tensor or module of the files that the model's class does not know, and that may be left out"
    command.add_argument("--drop", action="append", default=[], metavar="NAME", help=help_drop)


def _add_work(command: argparse.ArgumentParser) -> None:
    """How the work is done; none of it changes the result."""
    group = command.add_argument_group("work", "a run that is cut off is just run again, and goes on")
    help_size = f"of a file of the output, such as 500MB; what is done is kept by file ({SHARD_SIZE})"
    group.add_argument("--shard-size", default=SHARD_SIZE, metavar="SIZE", help=help_size)
    help_workers = "processes that share the work, its threads, and need its memory each (1)"
    group.add_argument("--workers", type=int, default=1, metavar="N", help=help_workers)
    help_restart = "throw away what an earlier run, cut off, has done"
    group.add_argument("--restart", action="store_true", help=help_restart)
    help_dry = "only tell sizes, bits, and about how much time, memory and disk it takes"
    group.add_argument("--dry-run", action="store_true", help=help_dry)


def _config(options: argparse.Namespace) -> SVDQConfig:
    names = [name for name in SVDQConfig.__init__.__annotations__ if hasattr(options, name)]
    if "target_bits" in names and "k" in names:
        raise ValueError("--target-bits spends salient weights instead of --k: give one of them")
    start = getattr(SVDQConfig, options.preset) if options.preset else SVDQConfig
    config: SVDQConfig = start(**{name: getattr(options, name) for name in names})
    return config


def _group_size(text: str) -> int | str:
    return int(text) if text.isdigit() else text


def _quantize(options: argparse.Namespace) -> dict[str, object]:
    config, started = _config(options), time.perf_counter()
    source = Source.resolve(options.model, drop=options.drop)
    check_names(source, config)
    if options.dry_run:
        return _estimate(source, options, config)
    work = {"shard_size": options.shard_size, "workers": options.workers, "restart": options.restart}
    result = quantize_source(source, options.out, config, **work)
    seconds = time.perf_counter() - started
    before, after = result.bytes_before, result.bytes_after
    if not options.quiet:
        screen = console()
        screen.print(totals_table(result.footprint))
        screen.print(
            f"{options.out}: {before / MEGABYTE:.1f} MB -> {after / MEGABYTE:.1f} MB in {seconds:.1f} s; "
            f"see its layers with: svdq inspect {options.out}",
            markup=False,
        )
        if after > before:
            screen.print(f"larger than it was: k = {config.k} salient weights a layer take 96 bits each")
    return {"seconds": seconds, "bytes_before": before, "bytes_after": after, **result.footprint.to_dict()}


def _estimate(source: Source, options: argparse.Namespace, config: SVDQConfig) -> dict[str, object]:
    work = {"shard_size": options.shard_size, "workers": options.workers}
    result = estimate_checkpoint(source, options.out, config, **work)
    if not options.quiet:
        screen = console()
        if result.footprint is not None:
            screen.print(layer_table(result.footprint))
        screen.print(estimate_table(result))
    return result.to_dict()


def _inspect(options: argparse.Namespace) -> dict[str, object]:
    result = read_footprint(options.folder)
    if not options.json:
        screen = console()
        screen.print(layer_table(result))
        screen.print(totals_table(result))
    return result.to_dict()


def _export(options: argparse.Namespace) -> dict[str, object]:
    source = Source.resolve(options.folder, drop=options.drop, packed=True)
    size = export_dense(source, options.out, options.dtype)
    if not options.json:
        print(f"{options.out}: {size / MEGABYTE:.1f} MB, dense, {options.dtype}")
    return {"bytes": size}


def _harness(arguments: Sequence[str]) -> int:
    try:
        harness.run(arguments)
    except ImportError as error:
        print(f"svdq {HARNESS}: {error}", file=sys.stderr)
        return 1
    return 0


def _push(options: argparse.Namespace) -> dict[str, object]:
    url = push_folder(
        options.folder,
        options.repo_id,
        private=options.private,
        revision=options.revision,
        replace=options.replace,
    )
    if not options.json:
        print(url)
    return {"url": url}


def _evaluate(options: argparse.Namespace) -> dict[str, object]:
    from svdq_hf.evaluation.run import run

    result = run(options)
    if not options.json:
        console().print(
            f"{result['cells']} cells in {result['seconds']:.0f} s; read {options.out}/report.html"
        )
    return result


def _demo(options: argparse.Namespace) -> dict[str, object]:
    config = _config(options)
    check_names(default_model(), config)
    result = run_demo(config, options.out)
    if not options.json:
        screen = console()
        dense = "" if config.embeddings else "; embeddings stay FP32"
        screen.print(_sentences(result))
        screen.print(
            f"embeddings, cosine to FP32: {result.embedding_cosine:.4f}; "
            f"reloaded model equal bit for bit: {'yes' if result.reload_equal else 'NO'}\n"
            f"{result.bytes_fp32 / MEGABYTE:.1f} MB -> {result.bytes_svdq / MEGABYTE:.1f} MB "
            f"({result.bits_per_weight:.2f} bits per weight in what is quantized{dense}); "
            f"loaded and quantized in {result.load_seconds:.1f} s"
        )
    if not result.reload_equal:
        raise RuntimeError("the reloaded model differs from the saved one")
    return result.to_dict()


def _sentences(result: DemoResult) -> Table:
    table = Table(title="similarity of two sentences (cosine)", box=SIMPLE_HEAD)
    table.add_column("sentences", overflow="fold")
    table.add_column("FP32", justify="right")
    table.add_column("quantized", justify="right")
    for pair, dense, quantized in zip(SENTENCES, result.similarity_fp32, result.similarity_svdq, strict=True):
        table.add_row("\n".join(pair), f"{dense:.3f}", f"{quantized:.3f}")
    return table


if __name__ == "__main__":
    sys.exit(main())
