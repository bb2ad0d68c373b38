"""Tables that the command line prints of a quantized model.

Not here: the tables of an evaluation's report (`evaluation.report.tables`).
"""

import sys
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:  # torch is imported by who makes what is shown here
    from svdq_hf.checkpoint.estimate import Estimate
    from svdq_hf.demo import DemoResult
    from svdq_hf.quantize.footprint import Footprint


def console() -> Console:
    """A console as wide as the terminal; 120 columns in a pipe or a file, so that no name is folded."""
    terminal = sys.stdout is not None and sys.stdout.isatty()  # None: closed by `>&-`
    return Console(width=None if terminal else 120, soft_wrap=not terminal)


def layer_table(result: "Footprint") -> Table:
    """A row for each quantized layer: shape, k, bits, and what was measured."""
    facts = list(dict.fromkeys(fact for layer in result.layers for fact in layer.facts))
    table = Table(title="quantized layers", box=SIMPLE_HEAD)
    table.add_column("layer", overflow="fold")
    for title in ("out x in", "k", "bits/weight", *(fact.replace("_", " ") for fact in facts)):
        table.add_column(plain(title), justify="right")
    for layer in result.layers:
        measured = (f"{layer.facts[fact]:.4f}" if fact in layer.facts else "-" for fact in facts)
        shape = " x ".join(map(str, layer.shape))
        table.add_row(plain(layer.name), shape, str(layer.k), f"{layer.bits_per_weight:.3f}", *measured)
    return table


def plain(text: str) -> Text:
    """Text that may come from strangers, without markup or control characters."""
    return Text("".join(character if character.isprintable() else "?" for character in text))


def totals_table(result: "Footprint") -> Table:
    """The sums over a model."""
    from svdq_hf.quantize.footprint import dense_bytes

    table = Table(title="totals", box=SIMPLE_HEAD, show_header=False)
    errors = [layer.facts["relative_error"] for layer in result.layers if "relative_error" in layer.facts]
    rows = {
        "quantized layers": str(len(result.layers)),
        "weights in them": f"{result.weights:,}",
        "bits per weight": f"{result.bits_per_weight:.3f}",
        "kept in FP32": f"{result.salient_share:.3%}",
        "their bytes": f"{result.quantized_bytes:,} (in FP32 {dense_bytes(result.layers):,})",
        "dense bytes": f"{result.dense_bytes:,}",
    }
    if errors:
        rows["relative error"] = f"mean {sum(errors) / len(errors):.4f}, worst {max(errors):.4f}"
    for row in rows.items():
        table.add_row(*row)
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
