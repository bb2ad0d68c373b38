"""A footprint as text: a table of about ten lines with the totals first, as HTML too, and one sentence.

Wide enough for 60 columns. Not here: what is counted (`quantize.footprint`), the tables of the command line
(`cli.tables`).
"""

import textwrap
from collections.abc import Sequence
from html import escape
from typing import Any, Protocol

from svdq_hf.quantize.dense_tensors import DenseTensor

WIDTH = 60
MEGABYTE = 10**6
WORTH_SAYING = 0.2
"""Share of the bytes from which on a dense tensor is named, with what would shrink it."""


class Sizes(Protocol):
    """What is told of a `Footprint`, which prints itself by this file."""

    @property
    def layers(self) -> Sequence[Any]:
        """The quantized layers, a `LayerFootprint` each."""

    @property
    def dense(self) -> Sequence[DenseTensor]:
        """The dense tensors, the largest first."""

    @property
    def dense_bytes(self) -> int:
        """Bytes of these."""

    @property
    def quantized_bytes(self) -> int:
        """Bytes of the quantized layers."""

    @property
    def total_bytes(self) -> int:
        """Bytes of all."""

    @property
    def weights(self) -> int:
        """Number of weights in quantized layers."""

    @property
    def bits_per_weight(self) -> float:
        """Mean over these."""

    @property
    def salient_share(self) -> float:
        """Share of these that stay in FP32."""


def rows(result: Sizes, *, options: bool = False) -> dict[str, str]:
    """What a table says, by title.

    Args:
        result: of a model or a folder.
        options: whether choices are told as options of the command line instead of as Python's.
    """
    dense = sum(layer.weights for layer in result.layers) * 4
    told = {
        "size": f"{megabytes(result.total_bytes)}, all counted",
        "quantized": f"{len(result.layers)} layers, {result.weights:,} weights",
        "bits per weight": f"{result.bits_per_weight:.3f} in these layers",
        "kept in FP32": f"{result.salient_share:.3%} of these weights",
        "their bytes": f"{megabytes(result.quantized_bytes)} (in FP32 {megabytes(dense)})",
        "stayed dense": f"{megabytes(result.dense_bytes)}, {_share(result.dense_bytes, result)} of all",
    }
    if result.dense:
        largest = result.dense[0]
        told["largest dense"] = f"{largest.name}, {megabytes(largest.bytes)} in {largest.dtype}"
        if hint := shrinks(result, options=options):
            told["to shrink it"] = hint
    errors = {one.name: one.facts["relative_error"] for one in result.layers if "relative_error" in one.facts}
    if errors:
        worst = max(errors, key=errors.__getitem__)
        told["relative error"] = f"mean {sum(errors.values()) / len(errors):.4f}, worst {errors[worst]:.4f}"
        told["worst layer"] = worst
    return told


def as_text(result: Sizes) -> str:
    """The table in plain text, at most 60 columns wide where no name is longer."""
    told = rows(result)
    width = max(map(len, told)) + 2
    return "\n".join(line for row in told.items() for line in _lines(*row, width))


def _lines(title: str, text: str, width: int) -> list[str]:
    parts = textwrap.wrap(text, WIDTH - width, break_long_words=False, break_on_hyphens=False)
    return [f"{title if not at else '':<{width}}{part}" for at, part in enumerate(parts)]


def as_html(result: Sizes) -> str:
    """The table in HTML, as notebooks show it."""
    body = "".join(f"<tr><th>{escape(a)}</th><td>{escape(b)}</td></tr>" for a, b in rows(result).items())
    return f'<table style="text-align: left"><tbody>{body}</tbody></table>'


def sentence(result: Sizes, before: int | None = None, *, options: bool = False) -> str:
    """A model in a line: size before and after, bits, what stayed dense and how to shrink it.

    Args:
        result: of the model.
        before: bytes of the dense model; None: not known.
        options: see `rows`.
    """
    was = "" if before is None else f"{megabytes(before)} -> "
    found = (
        f"{was}{megabytes(result.total_bytes)}, {result.bits_per_weight:.2f} bits per weight in "
        f"{len(result.layers)} layers"
    )
    hint = shrinks(result, options=options)
    if not hint:
        return found
    largest = result.dense[0]
    what = "output head" if largest.choice == "lm_head" and "embed" not in largest.name else "embedding"
    return f"{found}; {_share(largest.bytes, result)} of that is the {largest.dtype} {what}: {hint}"


def shrinks(result: Sizes, *, options: bool = False) -> str:
    """The choice that would quantize the largest dense tensor, where that is worth saying; or nothing.

    Args:
        result: of the model.
        options: see `rows`.
    """
    largest = result.dense[0] if result.dense else None
    if largest is None or not largest.choice or largest.bytes < WORTH_SAYING * result.total_bytes:
        return ""
    return f"--{largest.choice.replace('_', '-')}" if options else f"{largest.choice}=True"


def megabytes(size: int) -> str:
    """Bytes in megabytes, or in gigabytes.

    >>> megabytes(13_400_000), megabytes(3_970_000_000)
    ('13.4 MB', '3.97 GB')
    """
    return f"{size / MEGABYTE:.1f} MB" if size < 1000 * MEGABYTE else f"{size / MEGABYTE / 1000:.2f} GB"


def _share(size: int, result: Sizes) -> str:
    return f"{size / max(1, result.total_bytes):.0%}"
