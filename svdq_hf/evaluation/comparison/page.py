"""Page of a comparison: one HTML file with the verdicts, the table and the pictures; it needs nothing else.

Not here: the page's look (`evaluation.report.page`), the rows (`evaluation.comparison.table`).
"""

import json
from pathlib import Path

from svdq_hf.evaluation.comparison.pictures import pictures
from svdq_hf.evaluation.comparison.result import ComparisonResult
from svdq_hf.evaluation.comparison.table import rows
from svdq_hf.evaluation.report.drawing import svg
from svdq_hf.evaluation.report.page import Picture, Section, page
from svdq_hf.evaluation.report.tables import Entry, Table

PAGE, FIGURES = "compare.html", "compare.json"
EXPLAINED = (
    "Change of loss: how much worse each answer is predicted, in nats; 0 is the reference, and 0.05 is a "
    "perplexity 5 % higher. KL: how far the answers' probabilities are from the reference's; 0 is the same. "
    "The intervals say how far the figures would scatter on other texts of this kind (95 %)."
)


def write_page(result: ComparisonResult, folder: str | Path) -> Path:
    """Write `compare.html`, and the figures as `compare.json`.

    Args:
        result: of the comparison.
        folder: to write into; it may exist.

    Returns:
        The page's file.
    """
    home = Path(folder)
    home.mkdir(parents=True, exist_ok=True)
    (home / FIGURES).write_text(json.dumps(result.to_dict(), indent=1) + "\n", encoding="utf-8")
    file = home / PAGE
    file.write_text(comparison_page(result), encoding="utf-8", errors="replace")
    return file


def comparison_page(result: ComparisonResult) -> str:
    """The text of the page.

    Args:
        result: of the comparison.
    """
    first = result.reference.name
    opening = [f"{result.n} {result.counted} of {result.measured_on}. Reference: {first}.", *result.notes]
    told = [line for one in result.others for line in (one.verdict, *(f"Try: {hint}" for hint in one.advice))]
    drawn = [Picture(one.name, one.figure.get_suptitle(), svg(one.figure)) for one in pictures(result)]
    section = Section("Figures", "figures", told, [_table(result)], drawn)
    return page(f"{first}: what was made of it", opening, [section])


def _table(result: ComparisonResult) -> Table:
    titles = ["", *(model.name for model in result.models)]
    entries = [
        [Entry(row.title, row.title), *(Entry(text, None) for text in row.texts)] for row in rows(result)
    ]
    return Table("figures", titles, entries, EXPLAINED, sortable=False)
