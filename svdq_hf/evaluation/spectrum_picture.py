"""Picture of spectra: the largest singular values of the layers that stand out most, before and after.

Not here: the values (`evaluation.spectrum`, or the callback of `training.spectral_decay_callback`).
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from svdq_hf.evaluation.report.drawing import blank, lettering, style, written_out
from svdq_hf.evaluation.report.palette import KNOWN
from svdq_hf.evaluation.report.short_names import short_names

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DRAWN: Final = 6  # layers: more lines cannot be told apart
_LOOKS: Final = [KNOWN[name] for name in ("svd", "magnitude", "relative", "awq", "spqr", "none")]


def spectra_picture(
    before: Mapping[str, Sequence[float]], after: Mapping[str, Sequence[float]] | None = None
) -> "Figure":
    """Draw the singular values of the layers whose first stands out most above their last.

    Args:
        before: falling values by layer, such as `SpectralDecayCallback.before`.
        after: of the same layers, drawn as solid lines; those before are dotted then. None: one model.

    Returns:
        A figure, for `evaluation.report.drawing`'s `svg` and `save`.

    Raises:
        ValueError: no layer, or another layer in `after`.
    """
    if not before or (after is not None and before.keys() != after.keys()):
        raise ValueError("spectra to draw must be of one layer or more, and the same before and after")
    chosen = sorted(before, key=lambda name: _prominence(before[name]), reverse=True)[:DRAWN]
    title = "largest singular values" + ("" if after is None else ": before (dotted) and after")
    with style():
        figure, axes = blank(title, 4.6)
        for name, short, look in zip(chosen, short_names(chosen), _LOOKS, strict=False):
            choices: dict[str, Any] = {"color": look.colour, "marker": look.marker, "markersize": 4}
            if after is not None:
                axes.plot(*_points(before[name]), linestyle=":", alpha=0.6, **choices)
            last = before if after is None else after
            axes.plot(*_points(last[name]), label=lettering(short), **choices)
        written_out(axes)
        axes.set_xlabel("number of the singular value")
        axes.set_xticks(range(1, 1 + max(len(before[name]) for name in chosen)))
        figure.legend(loc="outside lower center", ncols=2, fontsize=9)
    return figure


def _prominence(values: Sequence[float]) -> float:
    last = float(values[-1])
    return float(values[0]) / last if last > 0 else float("inf")


def _points(values: Sequence[float]) -> tuple[list[int], list[float]]:
    return list(range(1, 1 + len(values))), [float(value) for value in values]
