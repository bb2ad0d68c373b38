"""The command `svdq` and its subcommands, a module each in `COMMANDS`. It parses, calls and prints.

Exit codes: 0 done, 1 refused or failed (one line on standard error says why), 2 wrong usage, 130 interrupted.
With SVDQ_TRACEBACK=1 in the environment the place of an error is shown as well. Torch and transformers are
imported when a command runs, not to parse one. Not here: the options (`cli.options`), and each command (a
file of its name in `cli`).
"""

import argparse
import json
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Final

from svdq_hf.cli import (
    bench,
    chat,
    compare,
    demo,
    evaluate,
    export,
    gguf,
    inspect,
    lm_eval,
    push,
    quantize,
    sensitivity,
    spectrum,
)
from svdq_hf.cli.options import Parser, examples
from svdq_hf.core.release import VERSION

COMMANDS: Final = (
    quantize,
    inspect,
    compare,
    chat,
    bench,
    export,
    gguf,
    push,
    demo,
    evaluate,
    sensitivity,
    spectrum,
)
"""Modules of the commands: `add` makes the parser, `run` returns what `--json` prints."""

TRACEBACK = "SVDQ_TRACEBACK"
"""The environment variable that switches tracebacks on."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: of the command; None: those of this process.

    Returns:
        The exit code.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments:
        _parser().print_help()
        return 0
    if list(arguments[:1]) == [lm_eval.NAME]:
        return _harness(arguments[1:])
    options = _parse(arguments)
    follows = os.environ.get("RANK", "0") != "0"  # of `accelerate launch`: the first process speaks
    options.quiet = options.json or follows
    try:
        if options.quiet or sys.stderr is None or not sys.stderr.isatty():  # None: closed by `2>&-`
            _disable_progress_bars()
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


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    options, strange = _parser().parse_known_args(arguments)
    if strange:
        options.parser.error(f"unrecognized arguments: {' '.join(strange)}")
    return options


def _parser() -> argparse.ArgumentParser:
    shown = examples("svdq demo", "svdq quantize MODEL OUT --preset best", "svdq inspect OUT")
    parser = Parser(prog="svdq", description="Data-free low-bit quantization for Transformers.", **shown)
    parser.add_argument("--version", action="version", version=f"svdq_hf {VERSION}")
    parser.set_defaults(parser=parser)
    commands = parser.add_subparsers(dest="command", required=True)
    for module in COMMANDS:
        command = module.add(commands)
        command.add_argument("--json", action="store_true", help="print JSON instead of tables")
        command.set_defaults(run=module.run, parser=command)
    lm_eval.add(commands)
    return parser


def _harness(arguments: Sequence[str]) -> int:
    try:
        lm_eval.run(arguments)
    except ImportError as error:
        print(f"svdq {lm_eval.NAME}: {error}", file=sys.stderr)
        return 1
    return 0


def _disable_progress_bars() -> None:
    """Switch off the Hub's bars, which transformers goes by when it is imported; and its own if it was."""
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]  # it lists no names

    disable_progress_bars()
    if "transformers" in sys.modules:
        from transformers.utils import logging

        logging.disable_progress_bar()


def _explained(error: Exception, options: argparse.Namespace) -> str:
    """An error in one line, with a remedy where its text has none."""
    from safetensors import SafetensorError

    text = " ".join(str(error).split())
    told = (ValueError, OSError, ImportError, SafetensorError, RuntimeError)
    if isinstance(error, told) and not isinstance(error, RecursionError):
        return text
    # An unforeseen error, mostly of transformers, about a damaged config.json.
    folder = getattr(options, "model", None) or getattr(options, "folder", None)
    cause = f"{folder}'s config.json or files may be damaged; " if folder else ""
    return f"{type(error).__name__}: {text} ({cause}{TRACEBACK}=1 shows where)"


def _print(result: dict[str, object] | None) -> OSError | None:
    """Print a result as JSON and flush what was printed before; returns the error where writing failed."""
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


if __name__ == "__main__":
    sys.exit(main())
