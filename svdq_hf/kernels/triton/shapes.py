"""Shapes of the kernels' tiles for each device, from `shapes.json`.

Under a device's name stand the shapes found best on it; a device that has none takes the default, which is
reasoned and not tuned: 512 bytes of a row at a time for few tokens, 64 rows for tensor cores. Nothing is
tried at run time; `examples/tune_gpu.py` tries, and prints an entry.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch


class Shape(NamedTuple):
    """A program's tile, and how it runs.

    Attributes:
        rows: of the weight; a power of two.
        blocks: of 64 columns, in one step; a power of two.
        warps: of a program.
        stages: of the pipeline of loads.
        programs: that each multiprocessor should have; where rows are fewer, columns are split.
    """

    rows: int
    blocks: int
    warps: int
    stages: int
    programs: int


@cache
def shapes() -> dict[str, dict[str, Shape]]:
    """The shapes in the file: device's name -> kernel -> shape."""
    told = json.loads(Path(__file__).with_name("shapes.json").read_text())
    return {
        device: {kernel: Shape(**shape) for kernel, shape in kernels.items()}
        for device, kernels in told.items()
    }


@cache
def shape_of(kernel: str, device: torch.device) -> Shape:
    """The shape of a kernel's tiles on a device.

    Args:
        kernel: "few", "tile" or "dequantize".
        device: where it runs.
    """
    found = shapes()
    return found.get(name_of(device), found["default"]).get(kernel, found["default"][kernel])


@cache
def name_of(device: torch.device) -> str:
    """The device's name, as its driver tells it; "cpu" where the interpreter runs."""
    return str(_properties(device).name) if device.type != "cpu" else "cpu"


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a device; 1 where the interpreter runs."""
    if device.type == "cpu":
        return 1
    properties = _properties(device)
    names = ("multi_processor_count", "gpu_subslice_count")  # of CUDA and ROCm, and of XPU
    return next(int(getattr(properties, name)) for name in names if hasattr(properties, name))


def _properties(device: torch.device) -> Any:
    return torch.get_device_module(device).get_device_properties(device)
