"""The console script `svdq`: `svdq_hf.cli`, and an interrupt while that is still being imported.

Importing torch takes seconds, and a package's own files are imported after the package: so this is a module
beside it.
"""

import sys


def main() -> int:
    """Run the command line; returns the exit code."""
    try:
        from svdq_hf.cli.command import main as run
    except KeyboardInterrupt:
        print("svdq: interrupted", file=sys.stderr)
        return 130
    return run()
