"""`svdq lm-eval`: EleutherAI's harness in a process that knows "svdq"; its own arguments, handed on."""

import sys
from collections.abc import Sequence
from typing import Any, Final

from svdq_hf.core.release import how_to_install

NAME: Final = "lm-eval"


def add(commands: Any) -> None:
    """Its line in `svdq --help`; `svdq` hands on all that follows the name, unparsed."""
    told = "EleutherAI's harness, which takes all that follows: svdq lm-eval run --model hf ..."
    commands.add_parser(NAME, help=told)


def run(arguments: Sequence[str]) -> None:
    """Run the harness as its own command would.

    Raises:
        ImportError: it is not installed.
    """
    try:
        from lm_eval.__main__ import cli_evaluate
    except ModuleNotFoundError as error:
        raise ImportError(f"{error}; the harness is not installed: {how_to_install('lm-eval')}") from error
    sys.argv = ["svdq lm-eval", *arguments]  # where it looks
    cli_evaluate()
