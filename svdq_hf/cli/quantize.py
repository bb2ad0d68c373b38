"""`svdq quantize`: a model -> a folder with the quantized model; or an estimate of what that takes.

Not here: the work itself (`checkpoint.quantize`, `checkpoint.estimate`).
"""

import argparse
import time
from typing import Any

from svdq_hf.cli.options import add_choices, add_drop, check_there, config_of, examples
from svdq_hf.config.choices import COMPUTE_DTYPES

LAYERS_SHOWN = 4

EXAMPLES = (
    "svdq quantize user/model OUT --preset best",
    "svdq quantize user/model OUT --preset self_calibrated",
    "svdq quantize FOLDER OUT --embeddings --dtype bfloat16 --dry-run",
    "svdq quantize FOLDER OUT --preset calibrated --calibration texts.txt",
)


def add(commands: Any) -> argparse.ArgumentParser:
    """Add the command's parser to those of `svdq`."""
    shown = examples(*EXAMPLES)
    parser: argparse.ArgumentParser = commands.add_parser(
        "quantize", help="a model -> a folder with the quantized model", **shown
    )
    parser.add_argument("model", help="a folder, or the Hub's user/model")
    parser.add_argument("out", help="folder to write; must not be there, or be empty")
    add_choices(parser, "quantize")
    _add_data(parser)
    _add_work(parser)
    add_drop(parser)
    return parser


def _add_data(parser: argparse.ArgumentParser) -> None:
    """Options of calibration data."""
    group = parser.add_argument_group(
        "data", "for --preset calibrated, --saliency awq, spqr, pqi or requant, --error-feedback data"
    )
    group.add_argument(
        "--calibration", metavar="FILE", help="a text file of the kind that the model will read"
    )
    samples, length = "windows of it that are read (16)", "tokens of a window (512)"
    group.add_argument("--samples", type=int, default=argparse.SUPPRESS, metavar="N", help=samples)
    group.add_argument("--length", type=int, default=argparse.SUPPRESS, metavar="L", help=length)


def _add_work(parser: argparse.ArgumentParser) -> None:
    """Options of how the work is done."""
    base = "name on the Hub of the model that is quantized, for the card; known where MODEL is one"
    parser.add_argument("--base-model", metavar="user/model", help=base)
    group = parser.add_argument_group(
        "work", "a run that is cut off is just run again; what is streamed goes on, the rest begins anew"
    )
    size = "of a file of the output, such as 500MB; what is done is kept by file (1GB)"
    group.add_argument("--shard-size", default=argparse.SUPPRESS, metavar="SIZE", help=size)
    workers = "processes that share the work, its threads, and need its memory each (1)"
    group.add_argument("--workers", type=int, default=1, metavar="N", help=workers)
    dtype = "of what stays dense (as in the files)"
    group.add_argument("--dtype", choices=COMPUTE_DTYPES, default=argparse.SUPPRESS, help=dtype)
    restart = "throw away what an earlier run, cut off, has done"
    group.add_argument("--restart", action="store_true", help=restart)
    dry = "only tell sizes, bits, and about how much time, memory and disk it takes"
    group.add_argument("--dry-run", action="store_true", help=dry)


def run(options: argparse.Namespace) -> dict[str, object]:
    """Quantize, and print sizes and errors; returns what `--json` prints."""
    check_there(options.model)
    from svdq_hf.checkpoint import Source
    from svdq_hf.checkpoint.quantize import check_names, quantize_source
    from svdq_hf.cli.tables import console, totals_table
    from svdq_hf.hub.readme import NO_BASE, names_base
    from svdq_hf.quantize.footprint_text import sentence

    config, started = config_of(options), time.perf_counter()
    _check_data(options, config)
    source = Source.resolve(options.model, drop=options.drop)
    kept = check_names(source, config)
    if not options.quiet:
        _show_kept(kept)
    if options.dry_run:
        return _estimate(source, options, config)
    work = _work(options, source) | {"restart": options.restart, "base_model": options.base_model}
    result = quantize_source(source, options.out, config, **work)
    seconds = time.perf_counter() - started
    before, after = result.bytes_before, result.bytes_after
    if not options.quiet:
        screen = console()
        screen.print(totals_table(result.footprint))
        screen.print(
            f"{options.out}: {sentence(result.footprint, before, options=True)}; in {seconds:.1f} s\n"
            f"see its layers with: svdq inspect {options.out}",
            markup=False,
        )
        if not names_base(options.out):
            screen.print(NO_BASE, markup=False)
        if after > before:
            screen.print(f"larger than it was: {_why_larger(config)}")
    return {"seconds": seconds, "bytes_before": before, "bytes_after": after, **result.footprint.to_dict()}


def _why_larger(config: Any) -> str:
    if config.activations is not None:
        return "embedding and output head are two matrices, where they may have been one"
    return f"k = {config.k} salient weights a layer take 96 bits each"


def _show_kept(kept: dict[str, list[str]]) -> None:
    """Print which layers each name keeps dense: a name can match more, or fewer, than was meant."""
    for name, layers in kept.items():
        shown = ", ".join(layers[:LAYERS_SHOWN]) + (", ..." if len(layers) > LAYERS_SHOWN else "")
        print(f"{name} keeps {len(layers)} layer{'s' if len(layers) > 1 else ''} dense: {shown}")


def _estimate(source: Any, options: argparse.Namespace, config: Any) -> dict[str, object]:
    from svdq_hf.checkpoint.estimate import estimate_checkpoint
    from svdq_hf.cli.tables import console, estimate_table, layer_table

    result = estimate_checkpoint(source, options.out, config, **_work(options, source))
    if not options.quiet:
        screen = console()
        if result.footprint is not None:
            screen.print(layer_table(result.footprint.layers, screen.width, how="layers that are quantized"))
        screen.print(estimate_table(result))
    return result.to_dict()


def _work(options: argparse.Namespace, source: Any) -> dict[str, Any]:
    """The options of how the work is done that were given, and the batches of the calibration text."""
    names = ("shard_size", "workers", "dtype")
    given = {name: getattr(options, name) for name in names if hasattr(options, name)}
    if options.calibration is None:
        return given
    from svdq_hf.calibration.texts import text_batches

    sizes = {name: getattr(options, name) for name in ("samples", "length") if hasattr(options, name)}
    return {**given, "batches": text_batches(options.calibration, source.folder, source.empty, **sizes)}


def _check_data(options: argparse.Namespace, config: Any) -> None:
    """Refuse choices that need data without any, and data or its sizes without a use."""
    needs = config.needs_batches
    if needs and options.calibration is None:
        raise ValueError(
            "these choices need data: give a text of the kind that the model will read, --calibration FILE "
            "(--samples N --length L); without data there is --preset best, for causal models --preset "
            "self_calibrated, or --error-feedback synthetic instead of data"
        )
    if options.calibration is not None and config.synthetic:
        raise ValueError(
            f"--calibration {options.calibration}: the model makes its calibration batches itself: leave the "
            "file out, or give --error-feedback data to read it instead"
        )
    if options.calibration is not None and not needs and config.activations is None:
        raise ValueError(
            f"--calibration {options.calibration}: nothing that was chosen needs data: give --preset "
            "calibrated, --error-feedback data or --saliency awq as well, or leave it out"
        )
    unused = [name for name in ("samples", "length") if hasattr(options, name)]
    if unused and options.calibration is None:
        raise ValueError(f"--{unused[0]} is of --calibration FILE, which is not given")
