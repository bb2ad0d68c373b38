"""Palette of a report: one colour and one marker per method, the same in every picture.

The colours are Okabe and Ito's (2008), told apart by colour-blind eyes, some of them darkened until
each has a contrast of 3 to 1 against a white page and against a dark one. The markers repeat the
distinction for print.
"""

from collections.abc import Iterable, Mapping
from typing import Final, NamedTuple

from svdq_hf.evaluation.report.cells import in_order

# Stand-ins for the page's own colours: a page replaces them where they are drawn.
INK: Final = "#1b1f24"
FAINT: Final = "#d0d7de"


class Look(NamedTuple):
    """Colour and marker of a method."""

    colour: str
    marker: str


KNOWN: Final[Mapping[str, Look]] = {
    "fp32": Look(INK, ""),
    "none": Look("#7d8590", "+"),
    "svd": Look("#d55e00", "o"),
    "magnitude": Look("#0077bb", "s"),
    "relative": Look("#b57a00", "D"),
    "awq": Look("#009068", "^"),
    "spqr": Look("#bb5f94", "v"),
    "random": Look("#7d8590", "x"),
}
_OTHERS: Final = (Look("#3f8fc0", "P"), Look("#8a63d2", "*"), Look("#a0702f", "h"), Look("#5b8a3a", "p"))


def looks(methods: Iterable[str]) -> dict[str, Look]:
    """The look of each method; unknown methods share four more looks, in order of their names.

    >>> looks(["svd", "mine"])["mine"].marker
    'P'
    """
    strangers = [method for method in in_order(methods) if method not in KNOWN]
    more = {method: _OTHERS[number % len(_OTHERS)] for number, method in enumerate(strangers)}
    return {**KNOWN, **more}
