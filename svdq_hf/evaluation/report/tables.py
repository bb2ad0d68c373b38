"""Tables of a report: their entries, how numbers are written, and the table as Markdown and CSV.

Nothing is computed here, and no table is known: `evaluation.report.columns` says what each one shows. An
entry carries the text to read and the value to sort by; a table also carries its records, with every number
in full, for the CSV.
"""

import csv
import io
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, Generic, NamedTuple, TypeVar

Value = float | str | None
ABSENT: Final = "-"
R = TypeVar("R")


class Entry(NamedTuple):
    """One entry of a table: the text shown, and the value it is sorted by."""

    text: str
    sort: Value


@dataclass(frozen=True)
class Column(Generic[R]):
    """A column: its title, and functions from a row to its text and to the value it is sorted by."""

    title: str
    text: Callable[[R], str]
    sort: Callable[[R], Value]

    def entry(self, row: R) -> Entry:
        """The entry of a row."""
        return Entry(self.text(row), self.sort(row))


@dataclass(frozen=True)
class Table:
    """A complete table: titles, entries, caption, notes, records with unrounded numbers, whether it sorts."""

    name: str
    titles: list[str]
    entries: list[list[Entry]]
    caption: str
    notes: list[str] = field(default_factory=list)
    records: list[Mapping[str, object]] = field(default_factory=list)
    sortable: bool = True

    def markdown(self) -> str:
        """The table with its caption and notes in GitHub's Markdown."""
        lines = [_line(self.titles), "|" + " --- |" * len(self.titles)]
        lines += [_line(entry.text for entry in entries) for entries in self.entries]
        return "\n\n".join(["\n".join(lines), *map(plain, [self.caption, *self.notes])]) + "\n"

    def csv(self) -> str:
        """The records as CSV; a mere line break where there are none."""
        names = list(dict.fromkeys(name for record in self.records for name in record))
        text = io.StringIO()
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.records)
        return text.getvalue()


def plain(text: str) -> str:
    r"""Text that Markdown and HTML leave alone: a stranger's name may hold marks of either.

    >>> plain("a|b <i>")
    'a\\|b &lt;i>'
    """
    flat = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", flat)


def number(value: float | None, digits: int = 4) -> str:
    """A number with a fixed number of decimals; "-" for None.

    >>> number(0.66066), number(None)
    ('0.6607', '-')
    """
    return ABSENT if value is None else f"{value:.{digits}f}"


def small(value: float | None) -> str:
    """A number of any size with three digits; "-" for None.

    >>> small(0.01234), small(1234.5), small(0.0000123)
    ('0.0123', '1.23e+03', '1.23e-05')
    """
    return ABSENT if value is None else f"{value:#.3g}"


def change(value: float | None) -> str:
    """A number with its sign; "-" for None.

    >>> change(0.01), change(-0.5)
    ('+0.0100', '-0.5000')
    """
    return ABSENT if value is None else f"{value:+.4f}"


def chance(p: float) -> str:
    """A p-value.

    >>> chance(0.0004), chance(0.0312)
    ('< 0.001', '0.031')
    """
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def listing(words: Iterable[object]) -> str:
    """Words joined by commas and "and".

    >>> listing([1, 16, 64]), listing(["a"])
    ('1, 16 and 64', 'a')
    """
    *start, end = map(str, words)
    return f"{', '.join(start)} and {end}" if start else end


def _line(texts: Iterable[str]) -> str:
    return f"| {' | '.join(map(plain, texts))} |"
