import gc
import os
from pathlib import Path

import pytest
import torch

from svdq_hf.calibration.mapped import mapped_zeros


def test_zeros_of_each_shape_that_are_summed_up_apart():
    found = mapped_zeros({"a": (3, 5), "b": (2, 2)})
    assert {name: tuple(one.shape) for name, one in found.items()} == {"a": (3, 5), "b": (2, 2)}
    assert all(one.dtype == torch.float32 and not one.any() for one in found.values())
    found["b"] += 2
    assert float(found["a"].sum()) == 0
    assert found["b"].tolist() == [[2, 2], [2, 2]]


def test_nothing_is_left_in_the_folder_and_a_matrix_outlives_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    last = mapped_zeros({"a": (3, 5), "b": (2, 2)})["b"]
    gc.collect()
    last += 1
    assert float(last.sum()) == 4
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="only Linux tells which memory is a file's")
def test_it_is_memory_of_a_file():
    zeros = mapped_zeros({"a": (1 << 10, 1 << 10)})["a"]
    zeros += 1
    maps = Path("/proc/self/maps").read_text().splitlines()
    place = zeros.data_ptr()
    (mine,) = [
        line for line in maps if int(line.split("-")[0], 16) <= place < int(line.split()[0].split("-")[1], 16)
    ]
    assert "(deleted)" in mine


def test_a_full_disk_is_told_before_anything_is_summed_up(monkeypatch):
    def full(*arguments: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"no room for 4\.0 GB of sums.*set TMPDIR"):
        mapped_zeros({"a": (1000, 1000000)})
