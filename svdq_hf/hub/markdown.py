"""Markdown for text from files of strangers: tables, code, plain words."""

import re
from collections.abc import Sequence
from typing import Any


def table(head: Sequence[str], rows: Any) -> list[str]:
    """The lines of a Markdown table.

    Args:
        head: titles of the columns.
        rows: texts of each row's cells, safe already (`plain`, `code`).
    """
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def plain(text: str) -> str:
    """Text that cannot end a table's cell or a comment: other characters become "?", at most 200 stay."""
    return re.sub(r"[^\w .,:;/@+*()=%-]", "?", str(text))[:200]


def code(text: str | list[str]) -> str:
    """One text, or several, as inline code."""
    return ", ".join(f"`{plain(one)}`" for one in ([text] if isinstance(text, str) else text))
