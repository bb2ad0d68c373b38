"""Report page: one HTML file that needs nothing else, with tables that sort, pictures inside, no network.

Every text that comes from the data is escaped, since names of tasks and models may come from strangers. The
pictures take the page's colours, so that they can be read in dark mode as well. Not here: its look
(`evaluation.report.page_style`), and what it says (`evaluation.report.summary`).
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Final

from svdq_hf.evaluation.report.page_style import CSS, SCRIPT
from svdq_hf.evaluation.report.palette import FAINT, INK
from svdq_hf.evaluation.report.tables import Entry, Table

_PAGE: Final = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<title>{title}</title>
<style>{css}</style>
</head>
<body>
<h1>{title}</h1>
{body}
<script>{script}</script>
</body>
</html>
"""


@dataclass(frozen=True)
class Picture:
    """A picture: its file's name without an ending, what it shows in words, and its SVG."""

    name: str
    words: str
    svg: str


@dataclass(frozen=True)
class Section:
    """One part of a report: title, anchor, sentences, tables, pictures."""

    title: str
    name: str
    sentences: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)


def page(title: str, opening: Iterable[str], sections: Sequence[Section]) -> str:
    """The whole HTML file.

    Args:
        title: of the page.
        opening: paragraphs at the top.
        sections: the parts; their sentences are repeated at the top as a summary.
    """
    body = [
        *(f"<p>{escape(text)}</p>" for text in opening),
        *map(_summary, sections),
        *map(_section, sections),
    ]
    return _PAGE.format(title=escape(title), css=CSS, body="\n".join(body), script=SCRIPT)


def inline(svg: str, name: str, words: str) -> str:
    """An SVG file as part of a page: its ids made unique, its ink the page's text colour.

    Args:
        svg: text of the file.
        name: prefix of the ids.
        words: what the picture shows, for screen readers.
    """
    start = svg.index("<svg")
    text = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", svg[start:]).replace("xlink:href", "href")
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = text.replace(INK, "currentColor").replace(FAINT, "var(--line)")
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(words)}"', 1)


def _summary(section: Section) -> str:
    if not section.sentences:
        return ""
    items = "\n".join(f"<li>{escape(sentence)}</li>" for sentence in section.sentences)
    return f'<h3><a href="#{section.name}">{escape(section.title)}</a></h3>\n<ul>\n{items}\n</ul>'


def _section(section: Section) -> str:
    drawn = "\n".join(_picture(picture) for picture in section.pictures)
    first, rest = section.tables[:1], section.tables[1:]
    parts = [f'<section id="{section.name}">', f"<h2>{escape(section.title)}</h2>", *map(_table, first)]
    parts += [f'<div class="pictures">\n{drawn}\n</div>'] if drawn else []
    parts += [
        f"<details><summary>{escape(table.caption)}</summary>\n{_table(table, note=False)}</details>"
        for table in rest
    ]
    return "\n".join([*parts, "</section>"])


def _picture(picture: Picture) -> str:
    return f"<figure>{inline(picture.svg, picture.name, picture.words)}</figure>"


def _table(table: Table, note: bool = True) -> str:
    numeric = [_is_numeric(column) for column in zip(*table.entries, strict=True)]
    made = _head if table.sortable else _plain_head
    head = "".join(made(title, number) for title, number in zip(table.titles, numeric, strict=True))
    rows = "\n".join(_row(entries, numeric) for entries in table.entries)
    texts = [table.caption] * note + table.notes
    notes = "".join(f'<p class="note">{escape(text)}</p>\n' for text in texts)
    return (
        f'<div class="box" tabindex="0" role="region" aria-label="{escape(table.name)} table"><table>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table></div>\n{notes}"
    )


def _is_numeric(column: Iterable[Entry]) -> bool:
    return all(entry.sort is None or isinstance(entry.sort, int | float) for entry in column)


def _head(title: str, numeric: bool) -> str:
    kind = " data-numbers" if numeric else ' class="words"'
    return f'<th scope="col" aria-sort="none"{kind}><button type="button">{escape(title)}</button></th>'


def _plain_head(title: str, numeric: bool) -> str:
    return f'<th scope="col" class="{"" if numeric else "words "}still">{escape(title)}</th>'


def _row(entries: Iterable[Entry], numeric: Iterable[bool]) -> str:
    cells = [
        f'<td{"" if number else " class=words"} data-sort="{_sort(entry)}">{escape(entry.text)}</td>'
        for entry, number in zip(entries, numeric, strict=True)
    ]
    return f"<tr>{''.join(cells)}</tr>"


def _sort(entry: Entry) -> str:
    """The value to sort by, as JavaScript's `Number` reads it."""
    if isinstance(entry.sort, float) and entry.sort in (float("inf"), float("-inf")):
        return "Infinity" if entry.sort > 0 else "-Infinity"
    return "" if entry.sort is None else escape(str(entry.sort))
