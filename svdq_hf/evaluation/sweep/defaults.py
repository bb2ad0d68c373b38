"""What a sweep compares where nobody says: names and numbers alone, so that a command line is fast."""

from typing import Final

KS: Final = (1, 16, 64, 256, 1024, 4096)
METHODS: Final = ("svd", "magnitude", "awq", "spqr", "random", "relative")
RANKS: Final = (8,)
SEEDS: Final = 3
GRID_NAMES: Final = {"default": "default", "group": "group 64, mse", "tensor": "tensor, absmax"}
"""The grids of `plan.GRIDS`, as the command line calls them."""
