"""Drawing of pictures: one style, safe text, the same bytes for the same numbers.

No pyplot and no backend: a figure is an object, and nothing is left behind in the process. Sizes are
chosen for a phone, where a picture is about 360 pixels wide and its text must still be readable. Not here:
what is drawn (`evaluation.report.score_plots`, `evaluation.report.layer_plots`).
"""

import io
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from typing import Any, Final

from svdq_hf.core.release import how_to_install
from svdq_hf.evaluation.report.palette import FAINT, INK

try:
    from matplotlib import font_manager, rc_context
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator
except ImportError as error:
    raise ImportError(f"the pictures need matplotlib: {how_to_install('evaluate')}") from error

WIDTH: Final = 4.8  # inches: 346 points, so that 10-point text keeps its size on a phone
LONGEST: Final = 30  # letters of a name in a picture
FONT: Final = "DejaVu Sans"  # which matplotlib carries: the same layout on every machine
_STYLE: Final[dict[Any, Any]] = {
    "svg.hashsalt": "svdq_hf",  # names inside the file: from its content alone
    "svg.fonttype": "none",  # text stays text: to select, to search, in the page's own font
    "font.family": FONT,
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
}
_NO_DATE: Final = dict.fromkeys(("Date", "Creator", "Format", "Type"))


def style() -> AbstractContextManager[None]:
    """Context manager: matplotlib's settings for a report."""
    return rc_context(_STYLE)


def blank(title: str, height: float) -> tuple[Figure, Axes]:
    """An empty figure with a title.

    Args:
        title: of the picture.
        height: in inches.
    """
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    return figure, figure.add_subplot()


def lettering(text: str) -> str:
    r"""Text for a picture: cut to length, without formulas or letters that the font lacks.

    >>> print(lettering("cost in $ of 犬"))
    cost in \$ of ?
    """
    known = "".join(letter if ord(letter) in _letters() else "?" for letter in text)
    short = known if len(known) <= LONGEST else f"…{known[1 - LONGEST :]}"
    return short.replace("\\", "/").replace("$", r"\$")


def widened(axes: Axes, least: float) -> None:
    """Make the y axis span at least so much, about its middle: what is smaller is noise, and looks like it.

    Args:
        axes: drawn already.
        least: difference of the two ends.
    """
    low, high = axes.get_ylim()
    more = max(0.0, least - (high - low)) / 2
    axes.set_ylim(low - more, high + more)


def written_out(axes: Axes) -> None:
    """Make the y axis logarithmic, of a decade at least, with plain numbers, three in each decade of few."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    more = max(1.0, (10 / (high / low)) ** 0.5)
    low, high = low / more, high * more
    axes.set_ylim(low, high)
    subs = (1.0, 2.0, 5.0) if high / low < 1e3 else (1.0,)
    axes.yaxis.set_major_locator(LogLocator(subs=subs))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


@cache
def _letters() -> frozenset[int]:
    font = font_manager.get_font(font_manager.findfont(FONT))
    return frozenset(font.get_charmap())


def svg(figure: Figure) -> str:
    """A figure as SVG, transparent, without a date."""
    with style():
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata=_NO_DATE, transparent=True)
    return text.getvalue()


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write a figure as `stem.svg` and `stem.png`, on white; returns the files."""
    files = [stem.with_name(f"{stem.name}.{kind}") for kind in ("svg", "png")]
    with style():
        figure.savefig(files[0], metadata=_NO_DATE, facecolor="white")
        figure.savefig(files[1], metadata={"Software": None}, facecolor="white", dpi=200)
    return files
