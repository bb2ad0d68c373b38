"""Hidden folder in which an output is made: `.OUT.unfinished`, owned by svdq, locked while a run is at work.

What a killed run has left there is found by the next run for the same output, which goes on with it
(`checkpoint.streaming.resume`) or removes it. Anything that svdq has not made is refused, never entered and
never deleted.
"""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from svdq_hf.format.files import full_disk_named

PLAN_FILE = "plan.json"
LOCK_FILE = "lock"
MODEL = "model"

_OURS = re.compile(rf"{LOCK_FILE}|{MODEL}|plan\.(json|partial)|\d{{5}}\.(json|data|partial)")
"""Names of everything that svdq writes into such a folder."""


def unfinished_folder(out: str | Path) -> Path:
    """The folder in which the output `out` is made until it is complete."""
    target = Path(out).absolute()
    return target.with_name(f".{target.name}.unfinished")


def model_folder(folder: Path) -> Path:
    """The subfolder of an unfinished folder that becomes the model."""
    return folder / MODEL


def check_own(folder: Path) -> None:
    """Refuse an unfinished folder that is not svdq's: a link, another user's, or one with other files in it.

    Args:
        folder: the unfinished folder; it need not exist.

    Raises:
        ValueError: it says what is wrong with it.
    """
    if not os.path.lexists(folder):
        return
    why = "is a symbolic link" if folder.is_symlink() else "is no folder" if not folder.is_dir() else ""
    if not why and hasattr(os, "geteuid") and folder.stat().st_uid != os.geteuid():
        why = "belongs to another user"
    if not why:
        entries = list(folder.iterdir())
        strange = sorted(one.name for one in entries if not _is_own(one))
        begun = not entries or LOCK_FILE in (one.name for one in entries)
        why = f"has {strange[0]} in it" if strange else "" if begun else "was not begun by svdq"
    if why:
        raise ValueError(
            f"{folder} {why}, and svdq works only in a folder that it has made; move or remove it, or name "
            "another output folder"
        )


def _is_own(entry: Path) -> bool:
    kind = entry.is_dir() if entry.name == MODEL else entry.is_file()
    return kind and not entry.is_symlink() and _OURS.fullmatch(entry.name) is not None


@contextmanager
def locked(folder: Path, *, wanted: bool = True) -> Iterator[None]:
    """Context manager that keeps other runs out of a folder; the system releases the lock if this run dies.

    Args:
        folder: the unfinished folder.
        wanted: False: do nothing.

    Raises:
        OSError: another run is at work there.
    """
    if not wanted:
        yield
        return
    # A link there is not followed: what it points to would be emptied.
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
    with open(os.open(folder / LOCK_FILE, flags, 0o644), "w") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # no such locks on Windows: there, runs are not kept apart
            pass
        except BlockingIOError as error:
            raise OSError(f"{folder}: another run is at work there; wait for it, or end it") from error
        yield


def empty(folder: Path) -> None:
    """Delete everything in an unfinished folder except its lock."""
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != LOCK_FILE:
            entry.unlink()


@contextmanager
def work_folder(out: str | Path, *, restart: bool = False) -> Iterator[Path]:
    """Context manager: a folder for work that is done in one go; yields the path for the model.

    What a killed run has left is removed first. The folder is removed at the end, whether or not the model
    was moved away.

    Args:
        out: the output folder.
        restart: whether to discard what a streamed run, cut off, has done for `out`.

    Raises:
        ValueError: the hidden folder is not svdq's, or has the work of a streamed run.
        OSError: another run is at work there.
    """
    folder = unfinished_folder(out)
    check_own(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        if (folder / PLAN_FILE).exists() and not restart:
            raise ValueError(
                f"{folder} has what a run with other choices has done, which was cut off: repeat that "
                "command to go on with it, begin anew with --restart, or remove the folder"
            )
        empty(folder)
        remove_old(folder)
        try:
            with full_disk_named(folder.parent):
                yield model_folder(folder)
        finally:
            shutil.rmtree(folder)


def remove_old(folder: Path) -> None:
    """Remove what killed runs of earlier releases have left: `.OUT.XXXXXXXX`, empty or with a model in it."""
    name = re.compile(rf"{re.escape(folder.name.removesuffix('unfinished'))}[a-z0-9_]{{8}}")
    for entry in folder.parent.iterdir():
        if name.fullmatch(entry.name) and entry.is_dir() and not entry.is_symlink():
            held = [one.name for one in entry.iterdir()]
            if held in ([], [MODEL]) and _is_ours_alone(entry):
                shutil.rmtree(entry)


def _is_ours_alone(folder: Path) -> bool:
    """Whether a folder is one that `tempfile.mkdtemp` made for this user, with a model in it or nothing."""
    found = folder.stat()
    mine = not hasattr(os, "geteuid") or (found.st_uid, found.st_mode & 0o777) == (os.geteuid(), 0o700)
    model = model_folder(folder)
    files = list(model.iterdir()) if model.is_dir() and not model.is_symlink() else []
    weights = any(file.suffix == ".safetensors" or file.name == "config.json" for file in files)
    return mine and (not files or weights)
