"""What quantizing a model will take, told without doing it: bytes, bits, time, memory, disk.

Sizes are exact, for every shape is known beforehand. Time and memory are measured on a few of the model's
own layers, in this process, and multiplied.
"""

import shutil
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svdq_hf.checkpoint import (
    SHARD_SIZE,
    check_target,
    folder_bytes,
    local_folder,
    model_class,
    parse_size,
    unfinished_folder,
)
from svdq_hf.config import SVDQConfig
from svdq_hf.footprint import Footprint
from svdq_hf.streaming.files import as_tensor, read_bytes
from svdq_hf.streaming.plan import Plan, Unit, Unstreamable, make_plan
from svdq_hf.streaming.run import bytes_needed
from svdq_hf.weight import quantize_weight

SAMPLES = 4
"""Shapes of which one layer is quantized for the estimate."""


@dataclass(frozen=True)
class Estimate:
    """What a run would take. in_memory: why the model cannot be streamed, or None.

    footprint: sizes afterwards. seconds, memory_bytes: estimated; None where the model is not streamed.
    """

    bytes_before: int
    footprint: Footprint | None
    seconds: float | None
    memory_bytes: int | None
    disk_bytes: int
    free_bytes: int
    sampled: tuple[str, ...] = ()
    in_memory: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON can hold it."""
        told = {
            "bytes_before": self.bytes_before,
            "bytes_after": self.footprint.total_bytes if self.footprint is not None else None,
            "seconds": self.seconds,
            "memory_bytes": self.memory_bytes,
            "disk_bytes": self.disk_bytes,
            "free_bytes": self.free_bytes,
            "sampled": list(self.sampled),
            "in_memory": self.in_memory,
        }
        return {**told, **(self.footprint.to_dict() if self.footprint is not None else {})}


def estimate(
    model: str | Path,
    out: str | Path,
    config: SVDQConfig,
    *,
    shard_size: str = SHARD_SIZE,
    workers: int = 1,
) -> Estimate:
    """What `quantize_checkpoint` with these arguments would take; writes nothing.

    Raises:
        ValueError: what it would raise before the work starts, and of the sampled layers.
    """
    check_target(out)
    size, source = parse_size(shard_size), local_folder(model)
    target = Path(out).absolute()
    there = next(parent for parent in target.parents if parent.exists())
    before, free = folder_bytes(source), shutil.disk_usage(there).free
    try:
        plan = make_plan(model_class(source), source, config, size)
    except Unstreamable as reason:
        after = reason.footprint
        disk = after.total_bytes if after is not None else before
        return Estimate(before, after, None, None, disk, free, in_memory=str(reason))
    idle = peak_memory()
    seconds, sampled = _measured(plan)
    memory = peak_memory() if workers == 1 else idle + workers * peak_memory()
    disk = bytes_needed(plan, unfinished_folder(out))
    return Estimate(before, plan.footprint, seconds / workers, memory, disk, free, tuple(sampled))


def _measured(plan: Plan) -> tuple[float, list[str]]:
    """Seconds that all layers will take, and the layers that were measured for it."""
    units = [unit for shard in plan.shards for unit in shard.units if unit.layer is not None]
    weights = Counter({shape: 0 for shape in (unit.place.shape for unit in units)})
    for unit in units:
        weights[unit.place.shape] += _weights(unit)
    largest = max(units, key=_weights).place.shape
    shapes = [largest, *(shape for shape, _ in weights.most_common() if shape != largest)][:SAMPLES]
    rates: dict[tuple[int, ...], float] = {}
    sampled = []
    for shape in shapes:
        unit = next(unit for unit in units if unit.place.shape == shape)
        rates[shape] = _seconds(unit, plan.config) / max(1, _weights(unit))
        sampled.append(str(unit.layer))
    others = sum(rates.values()) / len(rates)
    return sum(count * rates.get(shape, others) for shape, count in weights.items()), sampled


def _weights(unit: Unit) -> int:
    out, in_features = unit.place.shape
    return out * in_features


def _seconds(unit: Unit, config: SVDQConfig) -> float:
    """Time to read and quantize one layer."""
    started = time.perf_counter()
    dense = as_tensor(read_bytes(unit.place), unit.place)
    quantize_weight(dense.T.contiguous() if unit.transposed else dense, config, str(unit.layer))
    return time.perf_counter() - started


def peak_memory() -> int:
    """The most bytes of memory that this process has held so far; 0 where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
