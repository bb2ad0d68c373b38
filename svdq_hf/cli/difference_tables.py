"""Tables of `svdq inspect A B`: what differs between two quantized folders.

Not here: finding it out (`checkpoint.difference`).
"""

from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.table import Table

from svdq_hf.cli.tables import plain

if TYPE_CHECKING:
    from svdq_hf.checkpoint.difference import Difference
    from svdq_hf.quantize.footprint import Footprint, LayerFootprint

ABSENT = "-"
DENSE = "dense"


def changes_table(result: "Difference") -> Table:
    """Config keys that differ, and sizes, of A and B."""
    from svdq_hf.quantize.footprint_text import megabytes

    table = Table(title="what differs", box=SIMPLE_HEAD)
    for title in ("", "A", "B"):
        table.add_column(title, overflow="fold")
    for name, values in result.config.items():
        table.add_row(plain(name), *(plain(str(value)) for value in values))
    both = result.before, result.after
    table.add_row("size", *(megabytes(one.total_bytes) for one in both))
    table.add_row("quantized layers", *(str(len(one.layers)) for one in both))
    table.add_row("bits per weight", *(f"{one.bits_per_weight:.3f}" for one in both))
    table.add_row("mean relative error", *map(_mean_error, both))
    return table


def layers_table(result: "Difference", top: int | None) -> Table:
    """Bits and relative error of each layer in A and B, those whose error changed most first.

    Args:
        result: of two folders.
        top: layers that are shown; None: all.
    """
    layers = sorted(result.layers.items(), key=lambda item: -_change(*item[1]))
    shown = layers[:top]
    title = f"{len(shown)} of {len(layers)} layers, largest change of error first"
    table = Table(title=title, box=SIMPLE_HEAD)
    table.add_column("layer", overflow="fold")
    for column in ("bits A", "bits B", "error A", "error B"):
        table.add_column(column, justify="right")
    for name, pair in shown:
        bits = (DENSE if one is None else f"{one.bits_per_weight:.2f}" for one in pair)
        table.add_row(plain(name), *bits, *map(_error, pair))
    return table


def _change(first: "LayerFootprint | None", second: "LayerFootprint | None") -> float:
    values = [one.facts.get("relative_error", 0.0) if one is not None else 0.0 for one in (first, second)]
    return abs(values[1] - values[0])


def _error(layer: "LayerFootprint | None") -> str:
    error = None if layer is None else layer.facts.get("relative_error")
    return ABSENT if error is None else f"{error:.4f}"


def _mean_error(result: "Footprint") -> str:
    errors = [one.facts["relative_error"] for one in result.layers if "relative_error" in one.facts]
    return f"{sum(errors) / len(errors):.4f}" if errors else ABSENT
