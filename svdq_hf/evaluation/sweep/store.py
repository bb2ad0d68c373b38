"""Folder of a sweep: cells and overlaps as JSON lines, and hashes of what they were computed from.

Models, texts and examples are identified by their bytes, not by their names: otherwise the cells of a model
that was trained again, or of another text, would stand in one table with the old ones. Not here: how a cell
is computed (`evaluation.sweep.run`), and what a report reads (`evaluation.report.read`).
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from svdq_hf.evaluation.sweep.plan import Key
from svdq_hf.format.files import write_atomically

CELLS, OVERLAPS, INPUTS = "cells.jsonl", "overlap.jsonl", "inputs.json"

MODEL_FILES = (
    "config.json", "*.safetensors", "pytorch_model*.bin", "adapter_config.json",
    "tokenizer*", "vocab*", "merges.txt", "*.model", "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip
"""Patterns of the files in a model's folder that its answers depend on."""

Facts = Mapping[str, Any]
"""Hashes that identify an input; two are compared in the keys that both have."""


def finished(out: Path, task: str, model: str) -> set[Key]:
    """Keys of the cells that a folder holds; lines that a kill cut off are removed.

    Args:
        out: the folder.
        task: of the cells.
        model: of the cells.
    """
    cells, _ = (whole_lines(out / name) for name in (CELLS, OVERLAPS))
    return {
        Key(cell["method"], cell["grid"], cell["k"], cell["score_seed"], cell["rank"])
        for cell in cells
        if (cell["task"], cell["model"]) == (task, model)
    }


def whole_lines(file: Path) -> list[dict[str, Any]]:
    """The JSON lines of a file; an incomplete last line, cut off by a kill, is removed from the file."""
    text = file.read_text() if file.is_file() else ""
    whole, end, rest = text.rpartition("\n")
    if rest:
        file.write_text(whole + end)
    return [json.loads(line) for line in whole.splitlines() if line.strip()]


def append(file: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Append JSON lines to a file; they are on disk when this returns."""
    with file.open("a") as opened:
        opened.writelines(json.dumps(line) + "\n" for line in lines)
        opened.flush()
        os.fsync(opened.fileno())


def check_inputs(out: Path, task: str, data: Facts, models: Mapping[str, Facts]) -> None:
    """Record beside a task's cells what they are computed from, and compare it with what was recorded.

    Cells without a record, those of older runs, are taken to be of these inputs.

    Args:
        out: folder of the cells.
        task: of the cells.
        data: hashes of the text or the examples.
        models: hashes of each model's files, by its name.

    Raises:
        ValueError: there are cells of other data, or of another model of the same name.
    """
    noted = out / INPUTS
    known = json.loads(noted.read_text()) if noted.exists() else {}
    before = known.get(task, {"data": {}, "models": {}})
    done = {cell["model"] for cell in whole_lines(out / CELLS) if cell["task"].split(",")[0] == task}
    now = {"data": dict(data), "models": dict(before["models"])}
    if done:
        _check_same(out, f"{task} are of other data", before["data"], data)
        now["data"] = {**before["data"], **data}
    for name, facts in models.items():
        if name in done:
            _check_same(out, f"{name} are of another model", before["models"].get(name, {}), facts)
        now["models"][name] = dict(facts)
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(noted, json.dumps({**known, task: now}, indent=1) + "\n")


def _check_same(out: Path, what: str, before: Facts, now: Facts) -> None:
    other = [key for key in now if key in before and before[key] != now[key]]
    if other:
        told = [f"{key} {before[key]}, now {now[key]}" if isinstance(now[key], int) else key for key in other]
        raise ValueError(
            f"{out}: its cells of {what} (different: {'; '.join(told)}); "
            f"name another --out, or remove {out} to begin anew"
        )


def model_facts(folder: Path) -> dict[str, Any]:
    """The files of a model's folder that its answers depend on, with their hashes."""
    files = {file for pattern in MODEL_FILES for file in folder.glob(pattern) if file.is_file()}
    hashes = {}
    for file in sorted(files):
        with file.open("rb") as opened:
            hashes[file.name] = hashlib.file_digest(opened, "sha256").hexdigest()
    return {"list of files": sorted(hashes), **hashes}


def digest(texts: Iterable[str]) -> str:
    """A hash of several texts that also depends on where each ends.

    >>> digest(["ab", "c"]) == digest(["a", "bc"])
    False
    """
    found = hashlib.sha256()
    for text in texts:
        found.update(json.dumps(text).encode() + b"\n")
    return found.hexdigest()
