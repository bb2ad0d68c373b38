"""Heat map of a model's sensitivity: what rounding costs, by layer and by kind of matrix.

Not here: the figures (`quantize.sensitivity`).
"""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from svdq_hf.evaluation.report.drawing import blank, lettering, style
from svdq_hf.evaluation.report.short_names import short_names

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS: Final = "RdBu_r"
"""Red costs, blue gains; colour-blind eyes tell the two apart, and 0 is white."""
ROW: Final = 0.2  # inches, of one layer


def by_place(costs: Mapping[str, float]) -> tuple[list[str], list[str], dict[tuple[str, str], float]]:
    """Costs in rows of layers and columns of kinds: a name is split at its first number, others are left out.

    Args:
        costs: by the layer's name.

    Returns:
        Rows and columns in the order in which they come, and the cost at each place that there is.

    >>> rows, columns, found = by_place({"h.0.attn.q": 1.0, "h.0.up": 2.0, "h.1.up": 3.0, "pool": 4.0})
    >>> rows, columns
    (['h.0', 'h.1', ''], ['attn.q', 'up', 'pool'])
    >>> found["h.1", "up"]
    3.0
    """
    found: dict[tuple[str, str], float] = {}
    for short, cost in zip(short_names(list(costs)), costs.values(), strict=True):
        parts = re.fullmatch(r"((?:.*?\.)??\d+)\.(.+)", short)
        row, column = parts.groups() if parts else ("", short)
        column = re.sub(r"\.\d+\.", ".*.", column)
        found[row, column] = found.get((row, column), 0.0) + cost
    rows, columns = (list(dict.fromkeys(side)) for side in zip(*found, strict=True))
    return rows, columns, found


def sensitivity_picture(costs: Mapping[str, float]) -> "Figure":
    """Draw what rounding costs, a square for each matrix of each layer.

    Args:
        costs: the sum of PQI by the layer's name, in the model's order, in nats.

    Returns:
        A figure, for `evaluation.report.drawing`'s `svg` and `save`.

    Raises:
        ValueError: there is no layer.
    """
    if not costs:
        raise ValueError("a heat map needs one layer or more")
    rows, columns, found = by_place(costs)
    values = [[found.get((row, column), float("nan")) for column in columns] for row in rows]
    most = max(map(abs, found.values())) or 1.0
    with style():
        figure, axes = blank("what rounding costs the loss (PQI, nats)", 2.2 + ROW * len(rows))
        axes.grid(False)
        drawn = axes.pcolormesh(values, cmap=COLOURS, vmin=-most, vmax=most, edgecolors="none")
        axes.invert_yaxis()
        every = max(1, len(rows) // 30)
        axes.set_yticks([0.5 + place for place in range(0, len(rows), every)], rows[::every], fontsize=8)
        names = [lettering(column) for column in columns]
        axes.set_xticks([0.5 + place for place in range(len(columns))], names, rotation=60, ha="right")
        figure.colorbar(drawn, ax=axes, shrink=0.6)
    return figure
