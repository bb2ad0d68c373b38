"""Markdown for text that comes from files of strangers: tables, code, plain words."""

import re
from collections.abc import Sequence
from typing import Any


def table(head: Sequence[str], rows: Any) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def plain(text: str) -> str:
    """Text that cannot end a table's cell or a comment: names come from files of strangers."""
    return re.sub(r"[^\w .,:;/@+*()=%-]", "?", str(text))[:200]


def code(text: str | list[str]) -> str:
    return ", ".join(f"`{plain(one)}`" for one in ([text] if isinstance(text, str) else text))
