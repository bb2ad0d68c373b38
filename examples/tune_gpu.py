"""Shapes of the Triton kernels' tiles tried on this GPU, and the best as an entry of shapes.json.

python examples/tune_gpu.py              # some minutes, most of them Triton's compiler
python examples/tune_gpu.py --rehearse   # without a GPU, interpreted: one shape, and its time means nothing
"""

import json
import os
import sys
from functools import partial

if "--rehearse" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import gpu_checks
import torch
from gpu_timing import median_time

from svdq_hf.kernels.triton import launch, shapes


def tune(device: str) -> None:
    """Try shapes of tiles at 4096 x 4096, and print the best as an entry of shapes.json."""
    size = 4096 if device == "cuda" else 128
    layer = gpu_checks.packed(torch.randn(size, size, device=device))
    found = {}
    for kernel, tokens in (("few", 1), ("tile", 16)):
        x = torch.randn(tokens, layer.in_features, device=device, dtype=torch.bfloat16)
        times = {}
        for shape in candidates(kernel, device):
            launch.shape_of = lambda name, where, shape=shape: shape
            try:
                times[shape] = median_time([partial(layer, x)] * 20, device)
            except Exception as error:  # no registers or no memory for this one
                print(f"{kernel} {tuple(shape)}: {type(error).__name__}")
        best = min(times, key=lambda shape: times[shape])
        found[kernel] = dict(best._asdict())
        print(f"{kernel}: {1e6 * times[best]:.1f} us, {tuple(best)}, of {len(times)} shapes", flush=True)
    print(json.dumps({shapes.name_of(torch.device(device)): found}))


def candidates(kernel: str, device: str) -> list[shapes.Shape]:
    """Shapes worth a try."""
    if device == "cpu":
        return [shapes.shapes()["default"][kernel]]
    if kernel == "few":
        tiles = [
            (rows, blocks, stages) for rows in (2, 4, 8, 16) for blocks in (4, 8, 16) for stages in (1, 2, 3)
        ]
    else:
        tiles = [(rows, 1, stages) for rows in (32, 64, 128) for stages in (1, 2, 3, 4)]
    return [
        shapes.Shape(rows, blocks, warps, stages, programs)
        for rows, blocks, stages in tiles for warps in (2, 4, 8) for programs in (2, 4)
    ]  # fmt: skip


if __name__ == "__main__":
    with torch.no_grad(), gpu_checks.triton_first():
        tune("cpu" if "--rehearse" in sys.argv else "cuda")
