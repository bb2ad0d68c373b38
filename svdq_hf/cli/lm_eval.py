"""`svdq lm-eval`: EleutherAI's harness in a process that knows "svdq"; its own arguments, handed on."""

import sys
from collections.abc import Sequence


def run(arguments: Sequence[str]) -> None:
    """Run the harness as its own command would.

    Raises:
        ImportError: it is not installed.
    """
    try:
        from lm_eval.__main__ import cli_evaluate
    except ModuleNotFoundError as error:
        raise ImportError(f"{error}; the harness is not installed: pip install 'svdq_hf[lm-eval]'") from error
    sys.argv = ["svdq lm-eval", *arguments]  # where it looks
    cli_evaluate()
