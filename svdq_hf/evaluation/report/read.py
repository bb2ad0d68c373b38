"""Reader of a sweep's results: `cells.jsonl` and `overlap.jsonl`, every key checked.

A run that was killed leaves an incomplete last line, which is skipped. A run that was repeated leaves cells
twice; the later one counts. Anything else that does not fit is an error that names the line: a table over
half the data would look like a table over all of it. Not here: writing them (`evaluation.sweep.store`).
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from svdq_hf.evaluation.report.cells import Cell, Overlap
from svdq_hf.evaluation.sweep.store import CELLS, OVERLAPS


class Kind(NamedTuple):
    """What a key must hold, in words and as a check."""

    words: str
    holds: Callable[[Any], bool]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _are_numbers(value: object) -> bool:
    return isinstance(value, dict) and all(map(_is_number, value.values()))


def _or_null(kind: Kind) -> Kind:
    return Kind(f"{kind.words}, or null", lambda value: value is None or kind.holds(value))


TEXT: Final = Kind("text", lambda value: isinstance(value, str))
COUNT: Final = Kind("a whole number", _is_count)
NUMBER: Final = Kind("a number", _is_number)
NUMBERS: Final = Kind("an object of numbers", _are_numbers)
SCORES: Final = Kind("an object of at least one number", lambda value: _are_numbers(value) and value)
LIST: Final = Kind("a list of numbers", lambda value: isinstance(value, list) and all(map(_is_number, value)))
BITS: Final = Kind("0s and 1s", lambda value: isinstance(value, str) and set(value) <= {"0", "1"})

CELL_KEYS: Final[Mapping[str, Kind]] = {
    "task": TEXT,
    "model": TEXT,
    "method": TEXT,
    "k": NUMBER,
    "n": COUNT,
    "metrics": SCORES,
    "grid": _or_null(TEXT),
    "model_seed": _or_null(COUNT),
    "score_seed": _or_null(COUNT),
    "rank": _or_null(COUNT),
    "right": _or_null(COUNT),
    "correct": _or_null(BITS),
    "loss": _or_null(NUMBER),
    "kl": _or_null(NUMBER),
    "kl_each": _or_null(LIST),
    "majority": _or_null(COUNT),
    "bits_per_weight": _or_null(NUMBER),
    "relative_error": _or_null(NUMBERS),
    "seconds": NUMBERS,
}
OVERLAP_KEYS: Final[Mapping[str, Kind]] = {
    **dict.fromkeys(("task", "model", "layer", "other"), TEXT),
    "rank": COUNT,
    **dict.fromkeys(("k", "iou", "share", "chance"), NUMBER),
}


def read_cells(folder: str | Path) -> list[Cell]:
    """The cells of a sweep, each once.

    Args:
        folder: of the sweep.

    Raises:
        ValueError: there is none, or a line is not a cell; the message names the line and the remedy.
    """
    file = Path(folder) / CELLS
    cells = [_cell(found, where) for found, where in _objects(file, CELL_KEYS)]
    if not cells:
        raise ValueError(
            f"{folder}: no finished cell in {CELLS}; make some with "
            f"`svdq evaluate --task rte --model MODEL --k 256 --saliency svd magnitude --out {folder}`"
        )
    return list({cell.key: cell for cell in cells}.values())


def read_overlaps(folder: str | Path) -> list[Overlap]:
    """The overlaps of a sweep, each once; an empty list where the file is absent.

    Args:
        folder: of the sweep.

    Raises:
        ValueError: a line is not an overlap; the message names the line.
    """
    file = Path(folder) / OVERLAPS
    found = [Overlap(**overlap) for overlap, _ in _objects(file, OVERLAP_KEYS)]
    return list({(one.task, one.model, one.layer, one.rank, one.k, one.other): one for one in found}.values())


def _cell(found: dict[str, Any], where: str) -> Cell:
    cell = Cell(**found)
    if not (math.isfinite(cell.k) and cell.k >= 0):
        raise ValueError(f"{where}: k is {cell.k}")
    if cell.n < 1 or (cell.right is not None and not 0 <= cell.right <= cell.n):
        raise ValueError(f"{where}: {cell.right} right of {cell.n}")
    if cell.correct is not None and (len(cell.correct), cell.correct.count("1")) != (cell.n, cell.right):
        raise ValueError(f"{where}: 'correct' does not hold {cell.n} answers with {cell.right} right ones")
    if cell.kl_each is not None and len(cell.kl_each) != cell.n:
        raise ValueError(f"{where}: 'kl_each' holds {len(cell.kl_each)} values for {cell.n} examples")
    return cell


def _objects(file: Path, keys: Mapping[str, Kind]) -> Iterator[tuple[dict[str, Any], str]]:
    """The checked objects of a file of JSON lines, each with its file and line number in words."""
    lines = file.read_text(encoding="utf-8", errors="replace").split("\n") if file.is_file() else []
    for number, line in enumerate(lines, start=1):
        where = f"{file}, line {number}"
        try:
            found = json.loads(line) if line.strip() else None
        except json.JSONDecodeError as error:
            if number == len(lines):  # no line break after it: cut off by a kill
                return
            raise ValueError(f"{where} is not JSON: {error}; delete it and run that cell again") from error
        if found is not None:
            yield _keys(found, keys, where), where


def _keys(found: object, keys: Mapping[str, Kind], where: str) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise ValueError(f"{where}: not an object")
    for key, kind in keys.items():
        if key not in found and not kind.holds(None):
            raise ValueError(f"{where}: the key {key!r} is missing")
        if not kind.holds(found.get(key)):
            raise ValueError(f"{where}: {key!r} must be {kind.words}, not {found[key]!r}")
    return {key: found.get(key) for key in keys}
