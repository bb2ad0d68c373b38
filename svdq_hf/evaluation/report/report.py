"""Report of a sweep: `report.html`, `report.md`, and the tables and pictures as files of their own.

It reads what `svdq evaluate` wrote and runs nothing: a report can be made again at any time, also from a
sweep that is half done, and the same cells give the same bytes. Not here: reading (`evaluation.report.read`),
computing (`evaluation.report.rows`).
"""

import re
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Final

from svdq_hf.evaluation.report.cells import Cell, Group, Overlap, groups, is_whole
from svdq_hf.evaluation.report.columns import claims, main_table, overlap_table, runs_table
from svdq_hf.evaluation.report.drawing import save, svg
from svdq_hf.evaluation.report.layer_plots import error_picture, overlap_picture
from svdq_hf.evaluation.report.page import Picture, Section, page
from svdq_hf.evaluation.report.palette import looks
from svdq_hf.evaluation.report.read import read_cells, read_overlaps
from svdq_hf.evaluation.report.rows import main_rows, overlap_rows
from svdq_hf.evaluation.report.score_plots import kl_picture, score_picture
from svdq_hf.evaluation.report.summary import sentences
from svdq_hf.evaluation.report.tables import listing, plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE: Final = "svdq: what 4 bits cost"
OPENING: Final = (
    "KL says how far the outputs of a model are from those of the same model in FP32: 0 is the same. Two "
    "methods that are not distinguishable (p > 0.05) have no order, whatever their scores."
)


def write_report(folder: str | Path) -> list[Path]:
    """Write the report of a sweep into its folder.

    Args:
        folder: of the sweep.

    Returns:
        The files written, the page first.

    Raises:
        ValueError: there is no cell in the folder, or a line that is not one; with the remedy.
    """
    home = Path(folder)
    cells, overlaps = read_cells(home), read_overlaps(home)
    sections, figures = _sections(cells, overlaps)
    opening = [_contents(cells), OPENING]
    written = [
        _write(home / "report.html", page(TITLE, opening, sections)),
        _write(home / "report.md", _markdown(opening, sections)),
    ]
    for section in sections:
        for table in section.tables:
            written.append(_write(home / "tables" / f"{section.name}-{table.name}.csv", table.csv()))
    (home / "pictures").mkdir(exist_ok=True)
    return written + list(
        chain.from_iterable(save(figure, home / "pictures" / name) for name, figure in figures.items())
    )


def _sections(
    cells: Sequence[Cell], overlaps: Sequence[Overlap]
) -> tuple[list[Section], dict[str, "Figure"]]:
    """Every section of the report, and the figures of its pictures by name."""
    taken: set[str] = set()
    figures: dict[str, Figure] = {}
    sections = []
    for group in groups(cells):
        parts = [group.task, group.family, group.grid or ""]
        drawn = _group_figures(group, cells)
        sections.append(_group_section(group, _name(parts, taken), drawn, figures))
    for key in dict.fromkeys((overlap.task, overlap.family, _rank(overlap)) for overlap in overlaps):
        part = [overlap for overlap in overlaps if (overlap.task, overlap.family, _rank(overlap)) == key]
        sections.append(_overlap_section(key, part, _name([*key, "overlap"], taken), figures))
    return sections, figures


def _group_figures(group: Group, cells: Iterable[Cell]) -> dict[str, "Figure"]:
    if group.of_presets:  # each row has a k of its own: there is nothing to draw against
        return {}
    look = looks(cell.method for cell in cells)
    rows = main_rows(group)
    drawn = {
        "score": score_picture(group, rows, look),
        "kl": kl_picture(group, rows, look),
        "error": error_picture(group, look),
    }
    return {name: figure for name, figure in drawn.items() if figure is not None}


def _group_section(
    group: Group, name: str, drawn: dict[str, "Figure"], figures: dict[str, "Figure"]
) -> Section:
    rows = main_rows(group)
    figures |= {f"{name}-{kind}": figure for kind, figure in drawn.items()}
    title = ", ".join(part for part in (group.task, group.family, group.grid) if part)
    pictures = [_picture(f"{name}-{kind}", figure) for kind, figure in drawn.items()]
    return Section(
        title, name, sentences(group, rows), [main_table(group, rows), runs_table(group)], pictures
    )


def _overlap_section(
    key: tuple[str, ...], overlaps: Sequence[Overlap], name: str, figures: dict[str, "Figure"]
) -> Section:
    rows = overlap_rows(overlaps)
    others = list(dict.fromkeys(row.other for row in rows))
    taken: set[str] = set()
    drawn = {f"{name}-{_name([other], taken)}": overlap_picture(overlaps, other) for other in others}
    figures |= drawn
    pictures = [_picture(stem, figure) for stem, figure in drawn.items()]
    title = f"{', '.join(key)}: what svd and other scores choose alike"
    return Section(title, name, claims(rows), [overlap_table(rows)], pictures)


def _rank(overlap: Overlap) -> str:
    return f"rank {overlap.rank}"


def _picture(name: str, figure: "Figure") -> Picture:
    return Picture(name, figure.get_suptitle(), svg(figure))


def _name(parts: Iterable[str], taken: set[str]) -> str:
    """A name for files and anchors, not yet in `taken`: letters, digits and dashes."""
    plain_name = re.sub(r"[^a-z0-9]+", "-", " ".join(parts).lower()).strip("-")[:80] or "part"
    tries = chain([plain_name], (f"{plain_name}-{number}" for number in range(2, len(taken) + 3)))
    name = next(name for name in tries if name not in taken)
    taken.add(name)
    return name


def _contents(cells: Sequence[Cell]) -> str:
    tasks = list(dict.fromkeys(cell.task for cell in cells))
    models = {cell.model for cell in cells}
    whole = [cell for cell in cells if is_whole(cell.grid)]
    methods = {cell.method for cell in cells if cell not in whole} - {"fp32", "none"}
    configs = len({(cell.method, cell.grid) for cell in whole})
    counts = {
        f"{len(methods)} way{'s' * (len(methods) != 1)} to choose the weights that stay in FP32": methods,
        f"{configs} whole config{'s' * (configs != 1)}": configs,
    }
    told = ", ".join(text for text, count in counts.items() if count)
    on = f"{len(cells)} runs: {len(models)} model{'s' * (len(models) != 1)} on {listing(tasks)}"
    return ", ".join(filter(None, [on, told])) + "."


def _markdown(opening: Iterable[str], sections: Sequence[Section]) -> str:
    parts = [f"# {TITLE}", *map(plain, opening)]
    for section in sections:
        parts += [f"## {plain(section.title)}"]
        parts += ["\n".join(f"* {plain(sentence)}" for sentence in section.sentences)]
        parts += [section.tables[0].markdown().rstrip()]
        parts += [f"![{plain(picture.words)}](pictures/{picture.name}.svg)" for picture in section.pictures]
    return "\n\n".join(part for part in parts if part) + "\n"


def _write(file: Path, text: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8", errors="replace", newline="\n")
    return file
