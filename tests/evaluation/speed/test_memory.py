"""Resident memory and its peak, in all and without mapped files."""

import mmap
import time

import pytest
import torch

from svdq_hf.evaluation.speed import memory
from svdq_hf.evaluation.speed.memory import Memory, memory_now, watched

MEGABYTE = 2**20
linux = pytest.mark.skipif(not memory.STATUS.is_file(), reason="needs Linux' /proc/self/status")


@linux
def test_memory_that_is_freed_in_the_block_is_its_peak():
    before = memory_now()
    with watched() as peak:
        # From the system itself: an allocator may still have as much from a test before, resident all along.
        held = mmap.mmap(-1, 64 * MEGABYTE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        torch.frombuffer(held, dtype=torch.uint8).fill_(1)
        time.sleep(0.3)  # the thread that looks may wait for a core
        held.close()
    above = peak.memory - before
    assert 60 * MEGABYTE < above.resident < 90 * MEGABYTE
    assert 60 * MEGABYTE < above.anonymous < 90 * MEGABYTE
    assert (memory_now() - before).anonymous < 30 * MEGABYTE


@linux
def test_pages_of_a_file_are_resident_and_not_anonymous(tmp_path):
    (tmp_path / "file").write_bytes(bytes(32 * MEGABYTE))
    before = memory_now()
    with watched() as peak, (tmp_path / "file").open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        torch.frombuffer(mapped, dtype=torch.uint8).max()
    above = peak.memory - before
    assert 30 * MEGABYTE < above.resident < 50 * MEGABYTE
    assert above.anonymous < 16 * MEGABYTE


def test_without_a_status_file_only_the_sum_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "STATUS", tmp_path / "none")
    monkeypatch.setattr(memory, "CLEAR", tmp_path / "no" / "file")
    with watched() as peak:
        torch.ones(MEGABYTE)
    assert peak.memory.anonymous is None
    assert peak.memory.resident > 50 * MEGABYTE  # torch is imported


def test_what_one_does_not_tell_the_other_does():
    assert Memory(1, None).most(Memory(None, None)) == Memory(1, None)
    assert Memory(1, 5).most(Memory(3, 4)) == Memory(3, 5)
    assert Memory(1, 5) - Memory(3, 4) == Memory(0, 1)
