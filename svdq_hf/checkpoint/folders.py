"""The output folder of a command: checked first, hidden while it is written, renamed when it is whole."""

import os
import re
from pathlib import Path

REPORT_FILE = "svdq_report.json"
SHARD_SIZE = "1GB"
"""A run that is cut off loses what it has done of one file."""


def check_target(out: str | Path) -> None:
    """Refuse to write into a folder that holds anything.

    Raises:
        ValueError: `out` is there and not an empty folder.
    """
    target = Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{out} is there already and not empty; name another folder or remove it")


def put_in_place(work: Path, target: Path) -> None:
    """Give a folder that is whole its name; `target` is not there, or empty."""
    if target.exists():
        target.rmdir()  # empty, or this fails and nothing is lost
    os.rename(work, target)


def unfinished_folder(out: str | Path) -> Path:
    """Where the work for `out` is done until it is whole."""
    target = Path(out).absolute()
    return target.with_name(f".{target.name}.unfinished")


def parse_size(text: str) -> int:
    """Bytes of a size such as "500MB".

    >>> parse_size("1.5GB")
    1500000000
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]B)", text.strip().upper())
    size = int(float(match[1]) * 1000 ** (1 + "KMGT".index(match[2][0]))) if match else 0
    if size == 0:
        raise ValueError(f"shard size {text!r}: must be a number and KB, MB, GB or TB, such as 500MB")
    return size
