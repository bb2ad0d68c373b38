"""The command line `svdq`."""

from svdq_hf.cli.command import main

__all__ = ["main"]
