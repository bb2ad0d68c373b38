"""Entry point of the command line `svdq`. What it does is in `cli.command`."""

import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; an interrupt during its imports is reported in one line as well.

    Args:
        arguments: of the command; None: those of this process.

    Returns:
        The exit code.
    """
    try:
        from svdq_hf.cli.command import main as run

        return run(arguments)
    except KeyboardInterrupt:
        print("svdq: interrupted", file=sys.stderr)
        return 130
