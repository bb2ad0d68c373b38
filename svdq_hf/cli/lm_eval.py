"""`svdq lm-eval`: EleutherAI's harness in a process that knows "svdq"; it takes the harness's arguments."""

import sys
from collections.abc import Sequence
from typing import Any, Final

from svdq_hf.cli.options import examples
from svdq_hf.core.release import how_to_install

NAME: Final = "lm-eval"


def add(commands: Any) -> None:
    """Add the command's line to `svdq --help`; what follows its name is passed on unparsed."""
    told = "EleutherAI's harness, which takes all that follows: svdq lm-eval run --model hf ..."
    shown = examples("svdq lm-eval run --model hf --model_args pretrained=FOLDER --tasks hellaswag")
    commands.add_parser(NAME, help=told, **shown)


def run(arguments: Sequence[str]) -> None:
    """Run the harness as its own command would.

    Args:
        arguments: of the harness.

    Raises:
        ImportError: the harness is not installed.
    """
    try:
        from lm_eval.__main__ import cli_evaluate
    except ModuleNotFoundError as error:
        raise ImportError(f"{error}; the harness is not installed: {how_to_install('lm-eval')}") from error
    sys.argv = ["svdq lm-eval", *arguments]  # where it looks
    cli_evaluate()
