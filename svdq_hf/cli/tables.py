"""Tables that the command line prints of a quantized model.

Not here: the tables of an evaluation's report (`evaluation.report.tables`).
"""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:  # torch is imported by who makes what is shown here
    from svdq_hf.checkpoint.estimate import Estimate
    from svdq_hf.demo import DemoResult
    from svdq_hf.quantize.footprint import Footprint, LayerFootprint


def console() -> Console:
    """A console as wide as the terminal; 120 columns in a pipe or a file, so that no name is folded."""
    terminal = sys.stdout is not None and sys.stdout.isatty()  # None: closed by `>&-`
    return Console(width=None if terminal else 120, soft_wrap=not terminal)


WIDE = 100
"""Columns from which on a table of layers has all that was measured; below, the relative error alone."""


def layer_table(layers: Sequence["LayerFootprint"], width: int = WIDE, *, how: str = "layers") -> Table:
    """A row for each quantized layer: shape, k, bits, and what was measured.

    Args:
        layers: in the order of the rows.
        width: of the screen, in columns.
        how: title.
    """
    measured = list(dict.fromkeys(fact for layer in layers for fact in layer.facts))
    facts = measured if width >= WIDE else [fact for fact in measured if fact == "relative_error"]
    table = Table(title=how, box=SIMPLE_HEAD, padding=(0, 1) if width >= WIDE else (0, 1, 0, 0))
    table.add_column("layer", overflow="fold")
    titles = [fact.replace("_", " ") for fact in facts] if width >= WIDE else ["error"] * len(facts)
    for title in ("out x in", "k", "bits", *titles):
        table.add_column(plain(title), justify="right")
    for layer in layers:
        values = (f"{layer.facts[fact]:.4f}" if fact in layer.facts else "-" for fact in facts)
        shape = (" x " if width >= WIDE else "x").join(map(str, layer.shape))
        table.add_row(plain(layer.name), shape, str(layer.k), f"{layer.bits_per_weight:.3f}", *values)
    return table


def plain(text: str) -> Text:
    """Text that may come from strangers, without markup or control characters."""
    return Text("".join(character if character.isprintable() else "?" for character in text))


def totals_table(result: "Footprint") -> Table:
    """The sums over a model, what is dense in it, and its worst layer."""
    from svdq_hf.quantize.footprint_text import rows

    table = Table(title="totals", box=SIMPLE_HEAD, show_header=False)
    table.add_column("")
    table.add_column("", overflow="fold")
    for title, text in rows(result, options=True).items():
        table.add_row(title, plain(text))
    return table


def sentences_table(result: "DemoResult") -> Table:
    """The demo's similarities, a row for each pair of sentences."""
    from svdq_hf.demo import SENTENCES

    table = Table(title="similarity of two sentences (cosine)", box=SIMPLE_HEAD)
    table.add_column("sentences", overflow="fold")
    table.add_column("FP32", justify="right")
    table.add_column("quantized", justify="right")
    for pair, dense, quantized in zip(SENTENCES, result.similarity_fp32, result.similarity_svdq, strict=True):
        table.add_row("\n".join(pair), f"{dense:.3f}", f"{quantized:.3f}")
    return table


def estimate_table(result: "Estimate") -> Table:
    """What a run would take: sizes, time, memory, disk."""
    from svdq_hf.checkpoint.streaming.byte_ranges import readable

    table = Table(title="nothing was written", box=SIMPLE_HEAD, show_header=False)
    after = result.footprint
    rows = {"before": readable(result.bytes_before)}
    if after is not None:
        rows["after"] = readable(after.total_bytes)
        rows["bits per weight"] = f"{after.bits_per_weight:.3f}"
        rows["kept in FP32"] = f"{after.salient_share:.3%}"
    if result.seconds is not None and result.memory_bytes is not None:
        rows["time, about"] = f"{clock(result.seconds)} (measured on {', '.join(result.sampled)})"
        rows["memory, about"] = readable(result.memory_bytes)
    if result.in_memory is not None:
        rows["memory"] = f"the whole model is quantized in memory: {result.in_memory}"
        rows["time"] = "not estimated"
    short = "" if result.disk_bytes <= result.free_bytes else ": NOT ENOUGH"
    rows["disk"] = f"{readable(result.disk_bytes)}, {readable(result.free_bytes)} are free{short}"
    for name, text in rows.items():
        table.add_row(name, plain(text))
    return table


def clock(seconds: float) -> str:
    """A time in the unit that people use for it.

    >>> clock(4.2), clock(754), clock(9000)
    ('4 s', '13 min', '2 h 30 min')
    """
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
