"""Defaults of a sweep, as plain names and numbers, so that a command line starts fast.

Not here: the plan that is made of them (`evaluation.sweep.plan`).
"""

from typing import Final

PERPLEXITY: Final = "perplexity"
"""The only task outside GLUE: its data is a text."""

KS: Final = (1, 16, 64, 256, 1024, 4096)
METHODS: Final = ("svd", "magnitude", "awq", "spqr", "random", "relative")
RANKS: Final = (8,)
SEEDS: Final = 3
PRESETS_GRID: Final = "presets"
"""Where other cells have the name of a grid, those of whole configs have this."""
STORED: Final = "as stored"
"""The method of a folder that is quantized already."""
GRID_NAMES: Final = {"default": "default", "group": "group 64, mse", "tensor": "tensor, absmax"}
"""The grids of `plan.GRIDS`, as the command line calls them."""
