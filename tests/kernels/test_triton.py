"""The Triton backend where there is no GPU: who computes, and its kernels' tests in Triton's interpreter."""

import os
import subprocess
import sys

import pytest
import torch
from places import ROOT

from svdq_hf.kernels.triton import backend
from svdq_hf.kernels.triton.shapes import name_of, processors, shape_of, shapes

needs_triton = pytest.mark.skipif(not backend.is_here(), reason="Triton is not installed")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _asked_anew():
    backend.refusal_of.cache_clear()
    yield
    backend.refusal_of.cache_clear()


@needs_triton
@pytest.mark.slow
def test_the_kernels_are_right_in_the_interpreter():
    """All of tests/kernels/triton, with the variable that Triton reads when it defines a kernel."""
    options = ["-q", "-p", "no:cacheprovider", "-W", "error", "tests/kernels/triton"]
    told = subprocess.run(
        [sys.executable, "-m", "pytest", *options],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": ""},
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert told.returncode == 0, told.stdout[-5000:] + told.stderr[-2000:]
    assert "failed" not in told.stdout


def test_on_a_cpu_they_run_only_in_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert backend.refusal_of(CPU) == "the tensors are on cpu, not on a GPU"
    backend.refusal_of.cache_clear()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(backend, "is_here", lambda: True)
    assert backend.refusal_of(CPU) is None


def test_on_a_gpu_it_is_refused_without_triton_and_where_the_gpu_is_too_old(monkeypatch):
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(backend, "is_here", lambda: False)
    assert backend.refusal_of(gpu) == "Triton is not installed"
    monkeypatch.setattr(backend, "is_here", lambda: True)
    for capability, reason in (
        ((8, 0), None),
        ((7, 5), "compute capability 7.5 has no products of bfloat16"),
    ):
        backend.refusal_of.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert backend.refusal_of(gpu) == reason


@pytest.mark.parametrize("device", ["mps", "meta"])
def test_other_devices_are_refused_by_name(device):
    assert backend.refusal_of(torch.device(device)) == f"Triton has no kernels for {device}"


def test_float64_is_refused():
    assert "torch.float64" in backend.supports(torch.empty(0, dtype=torch.float64), None, 0, 0)


def test_every_device_in_the_file_has_powers_of_two():
    for device, kernels in shapes().items():
        assert kernels.keys() <= {"few", "tile", "dequantize"}, device
        for shape in kernels.values():
            assert all(number & (number - 1) == 0 for number in (shape.rows, shape.blocks, shape.warps))
            assert min(shape) >= 1
    assert shapes()["default"].keys() == {"few", "tile", "dequantize"}


def test_a_device_takes_its_own_shapes_and_the_default_for_what_it_has_not(monkeypatch):
    few = shapes()["default"]["few"]._replace(rows=4)
    monkeypatch.setattr("svdq_hf.kernels.triton.shapes.shapes", lambda: {**SHAPES, "cpu": {"few": few}})
    shape_of.cache_clear()
    assert (name_of(CPU), processors(CPU)) == ("cpu", 1)
    assert shape_of("few", CPU) == few
    assert shape_of("tile", CPU) == SHAPES["default"]["tile"]
    shape_of.cache_clear()


SHAPES = shapes()
