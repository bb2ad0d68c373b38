"""Resident memory of this process, now and at its peak: in all, and the anonymous part of it.

Resident memory is what lies in RAM: anonymous pages (what was allocated) and pages of mapped files
(libraries, and safetensors files that a tensor still reads from), which the system may take back without
writing anything. Linux tells both, others only the sum. Not here: what a model's tensors should need
(`quantize.footprint`).
"""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"
"""What Linux is told (`man 5 proc`, clear_refs) to begin a new peak, VmHWM, at what is resident now."""
INTERVAL = 0.002
"""Seconds between two looks at what Linux keeps no peak of."""


class Memory(NamedTuple):
    """Bytes of memory; None where the system does not tell.

    Attributes:
        resident: in RAM, pages of mapped files included.
        anonymous: the part that belongs to no file.

    >>> Memory(900, 500) - Memory(300, 200), Memory(900, None) - Memory(300, None)
    (Memory(resident=600, anonymous=300), Memory(resident=600, anonymous=None))
    """

    resident: int | None
    anonymous: int | None

    def __sub__(self, other: "Memory") -> "Memory":
        pairs = zip(self, other, strict=True)
        return Memory(*(None if a is None or b is None else max(0, a - b) for a, b in pairs))

    def most(self, other: "Memory") -> "Memory":
        """The larger of each figure; of one that only one has, that."""
        known = ([one for one in pair if one is not None] for pair in zip(self, other, strict=True))
        return Memory(*(max(pair, default=None) for pair in known))


def memory_now() -> Memory:
    """What this process uses now."""
    if STATUS.is_file():
        told = _status()
        return Memory(told.get("VmRSS"), told.get("RssAnon"))
    return Memory(_resident_elsewhere(), None)


def free_memory() -> int | None:
    """Bytes of memory that a new process could use; None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        pass
    try:
        import psutil  # type: ignore[import-untyped]  # has stubs in a package of their own
    except ImportError:
        return None
    return int(psutil.virtual_memory().available)


def check_fits(where: str, weights: int, dtype: str = "float32") -> None:
    """Refuse a model that does not fit into the memory that is free, before the system kills the process.

    Args:
        where: the model's folder or name.
        weights: how many it has.
        dtype: of them.

    Raises:
        ValueError: it says how much is needed and how much is free.
    """
    needed, free = weights * (4 if dtype == "float32" else 2), free_memory()
    if free is not None and needed > free:
        raise ValueError(
            f"{where}: needs {needed / 1e9:.1f} GB of memory in {dtype}, {free / 1e9:.1f} are free; take a "
            "smaller model of the family, or a machine with more"
        )


class Peak:
    """The most memory used within `watched`, which fills it."""

    def __init__(self) -> None:
        self.memory = Memory(None, None)

    def look(self) -> None:
        """Take what is used now into account."""
        self.memory = self.memory.most(memory_now())


@contextmanager
def watched() -> Iterator[Peak]:
    """Context manager: the peak of memory in its block.

    The peak of resident memory is Linux' own where it can be begun anew; else, as for anonymous memory, a
    thread looks every few milliseconds.
    """
    peak, done = Peak(), threading.Event()
    own = _begin_peak()

    def watch() -> None:
        while not done.wait(INTERVAL):
            peak.look()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()
        peak.look()
        if own:
            peak.memory = peak.memory.most(Memory(_status().get("VmHWM"), None))


def _begin_peak() -> bool:
    """Whether VmHWM counts from now on, and not from the start of the process."""
    try:
        CLEAR.write_text(RESET_PEAK)
    except OSError:  # no Linux, or a container that forbids it
        return False
    return "VmHWM" in _status()


def _status() -> dict[str, int]:
    """The sizes in /proc/self/status, in bytes, by name."""
    lines = (line.split() for line in STATUS.read_text().splitlines())
    return {words[0].rstrip(":"): 1024 * int(words[1]) for words in lines if words[2:] == ["kB"]}


def _resident_elsewhere() -> int | None:
    """Resident bytes where there is no /proc: now, or the peak so far; None: not told."""
    try:
        import psutil
    except ImportError:
        return _peak_so_far()
    return int(psutil.Process().memory_info().rss)


def _peak_so_far() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
