"""Measured quality of a model in its card: what `svdq compare --card` found, kept beside the weights.

The file goes wherever the folder goes, so a card that is written anew says the same. Figures of other weights
than the folder's are left out. Not here: measuring (`evaluation.comparison`).
"""

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from svdq_hf.format.files import folder_bytes, write_atomically
from svdq_hf.hub.markdown import code, plain, table

MEASURED = "svdq_quality.json"
TITLE = "## Measured quality"
OF_WEIGHTS = "weights_bytes"
"""The key that says of which weights the figures are."""

logger = logging.getLogger(__name__)


def remember(folder: str | Path, found: Mapping[str, Any]) -> None:
    """Keep what was measured of a folder; an earlier result on the same inputs is replaced.

    Args:
        folder: of the quantized model.
        found: "reference", "measured_on", and "figures": texts by title.
    """
    kept = [one for one in _known(folder) if _inputs(one) != _inputs(found)]
    entry = {**found, OF_WEIGHTS: folder_bytes(folder)}
    write_atomically(Path(folder) / MEASURED, json.dumps([*kept, entry], indent=1) + "\n")


def _inputs(found: Mapping[str, Any]) -> tuple[object, object]:
    return found.get("reference"), found.get("measured_on")


def _known(folder: str | Path) -> list[dict[str, Any]]:
    file = Path(folder) / MEASURED
    try:
        found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
        size = folder_bytes(folder) if found else 0
        return [one for one in found if one[OF_WEIGHTS] == size and isinstance(one["figures"], dict)]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        logger.warning("%s: damaged, and left out of the card (%r)", file, error)
        return []


def measured_lines(folder: str | Path) -> list[str]:
    """The lines of a card about measured quality; none where nothing was measured.

    Args:
        folder: of the quantized model.
    """
    lines = [TITLE]
    for one in _known(folder):
        rows = [(plain(title), plain(text)) for title, text in one["figures"].items()]
        told = f"Beside {code(str(one.get('reference')))}, on {plain(str(one.get('measured_on')))}:"
        lines += ["", told, "", *table(("", ""), rows)]
    return lines if len(lines) > 1 else []


def with_measured(section: str, folder: str | Path) -> str:
    """The generated section of a card with the measured quality as it is now.

    Args:
        section: text between the card's two comments.
        folder: of the quantized model.
    """
    rest = re.sub(rf"^{TITLE}\n.*?(?=^## |\Z)", "", section.replace("\r\n", "\n"), flags=re.M | re.S)
    return "\n".join([rest.rstrip(), "", *measured_lines(folder)]).rstrip()
