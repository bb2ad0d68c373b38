"""Output folder of a command: checked first, hidden while it is written, renamed when it is complete.

Not here: the hidden folder's owner and lock (`checkpoint.unfinished`).
"""

import os
import re
import shutil
from pathlib import Path

from svdq_hf.checkpoint.streaming.byte_ranges import readable
from svdq_hf.config.choices import COMPUTE_DTYPES

SHARD_SIZE = "1GB"
"""Default size of a file; a run that is cut off loses its work on one file."""

A_SOURCE = "a model's folder, or its name on the Hub, user/model"
A_CONFIG = "such as SVDQConfig(k=256), or SVDQConfig(**choices) of a dict"
A_SIZE = "such as '500MB'"

MOUNTS = Path("/proc/self/mountinfo")
"""Linux's list of mount points; the fifth column is the folder."""


def check_target(out: str | Path) -> None:
    """Refuse, before any work is done, an output folder that could not be renamed into place at the end.

    Args:
        out: folder of the output.

    Raises:
        ValueError: `out` exists and is not an empty folder, is a symbolic link or a mount point, lies inside
            a file, its name is not UTF-8, or it is that of a GGUF file.
    """
    check_text(out)
    target = Path(out).absolute()
    if target.suffix == ".gguf":
        raise ValueError(
            f"{out}: a folder is written here; to make a GGUF file of one of 16 bits: "
            f"svdq gguf F16.gguf {out}"
        )
    if target.is_symlink():
        raise ValueError(
            f"{out} is a symbolic link to {os.readlink(target)}, and a folder cannot take its place; name "
            "the folder itself, or remove the link"
        )
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{out} is there already and not empty; name another folder or remove it")
    if _is_mount_point(target):
        raise ValueError(f"{out} is a mount point, and cannot be replaced; name a folder in it: {out}/model")
    if target.name in ("", ".."):
        raise ValueError(f"{out} does not end with the name of a folder; name the folder to write")
    there = _nearest(target.parent)
    if not there.is_dir():
        raise ValueError(f"{out}: {there} is a file, no folder; name another folder")


def check_text(name: str | Path) -> None:
    """Refuse a path that is not UTF-8: config files, cards and the safetensors library hold text.

    Args:
        name: the path.

    Raises:
        ValueError: it shows the path with its other bytes escaped.
    """
    text = os.fspath(name)
    if "\0" in text or text != text.encode(errors="replace").decode():
        raise ValueError(f"{text!a}: this name is not UTF-8 text; rename it, or name another")


def _is_mount_point(folder: Path) -> bool:
    """Whether a folder is a mount point; bind mounts, which `os.path.ismount` does not know, count."""
    if not folder.exists():
        return False
    if os.path.ismount(folder):
        return True
    try:
        columns = [line.split()[4] for line in MOUNTS.read_text(errors="surrogateescape").splitlines()]
    except (OSError, IndexError):
        return False
    return re.sub(r"[ \t\n\\]", lambda one: f"\\{ord(one[0]):03o}", os.path.realpath(folder)) in columns


def check_disk(folder: Path, needed: int) -> None:
    """Refuse work that the disk of a folder has no room for.

    Args:
        folder: on that disk; it need not exist yet.
        needed: bytes.

    Raises:
        ValueError: it says how much is needed and how much is free.
    """
    free = free_bytes(folder)
    if needed > free:
        raise ValueError(
            f"{folder}: needs {readable(needed)} of disk, and {readable(free)} are free; "
            "make room, or name a folder on another disk"
        )


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk of a folder, or of its nearest parent that exists."""
    return shutil.disk_usage(_nearest(folder)).free


def _nearest(folder: Path) -> Path:
    return next(parent for parent in (folder, *folder.parents) if parent.exists())


def put_in_place(work: Path, target: Path) -> None:
    """Rename a complete folder to its final name; `target` must not exist, or be empty."""
    if target.exists():
        target.rmdir()  # empty, or this fails and nothing is lost
    os.rename(work, target)


def check_workers(workers: int) -> None:
    """Refuse a number of worker processes below 1.

    Raises:
        ValueError: it names the number.
    """
    if workers < 1:
        raise ValueError(f"workers={workers}: must be 1 or more")


def check_dtype(dtype: str | None) -> None:
    """Refuse a dtype that what stays dense cannot have.

    Raises:
        ValueError: it names the dtype and the possible ones.
    """
    if dtype is not None and dtype not in COMPUTE_DTYPES:
        raise ValueError(f"dtype={dtype!r}: must be one of {COMPUTE_DTYPES}")


def parse_size(text: str) -> int:
    """Bytes of a size such as "500MB".

    Raises:
        ValueError: it is not a number above 0 followed by KB, MB, GB or TB.

    >>> parse_size("1.5GB")
    1500000000
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]B)", text.strip().upper()) if type(text) is str else None
    size = int(float(match[1]) * 1000 ** (1 + "KMGT".index(match[2][0]))) if match else 0
    if size == 0:
        raise ValueError(f"shard size {text!r}: must be a number and KB, MB, GB or TB, such as 500MB")
    return size
