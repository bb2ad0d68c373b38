"""Estimate of what quantizing a model takes, without doing it: bytes, bits, time, memory, disk.

Sizes are exact, since every shape is known beforehand. Time and memory are measured on a few of the model's
own layers, in this process, and multiplied. Not here: the run itself (`checkpoint.quantize`).
"""

import math
import sys
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, Unpack

from svdq_hf.checkpoint.folders import (
    A_CONFIG,
    A_SIZE,
    A_SOURCE,
    SHARD_SIZE,
    check_dtype,
    check_target,
    check_workers,
    free_bytes,
    parse_size,
)
from svdq_hf.checkpoint.source import Source
from svdq_hf.checkpoint.streaming.plan import StreamPlan, make_plan
from svdq_hf.checkpoint.streaming.resume import bytes_needed
from svdq_hf.checkpoint.streaming.unit import Unit, Unstreamable
from svdq_hf.checkpoint.unfinished import check_own, unfinished_folder
from svdq_hf.config import SVDQConfig
from svdq_hf.core.arguments import checked_arguments
from svdq_hf.quantize.footprint import Footprint
from svdq_hf.quantize.input_statistics import check_loss
from svdq_hf.quantize.weight import quantize_weight

SAMPLES = 4
"""Shapes of which one matrix is quantized for the estimate."""


@dataclass(frozen=True)
class Estimate:
    """What a run would take.

    Attributes:
        bytes_before: of the source's safetensors files.
        footprint: sizes afterwards; None where they are not known before the run.
        seconds: estimated time; None where the model is not streamed.
        memory_bytes: estimated memory; None where the model is not streamed.
        disk_bytes: disk that the run needs.
        free_bytes: disk that is free.
        sampled: names of the layers that time was measured on.
        in_memory: the reason why the model cannot be streamed; None where it can.
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
        """All fields, in types that JSON has."""
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


class Sizing(TypedDict, total=False):
    """What `estimate_checkpoint` takes beside a model, a folder and a config.

    Attributes:
        shard_size: size of a file of the output, such as "500MB".
        workers: processes that would share the work.
        batches: calibration batches that the run would have; only whether there are any is looked at.
        dtype: of what stays dense, such as "bfloat16"; None: as in the files.
    """

    shard_size: str
    workers: int
    batches: Iterable[Any] | None
    dtype: str | None


@checked_arguments(model=A_SOURCE, config=A_CONFIG, shard_size=A_SIZE)
def estimate_checkpoint(
    model: str | Path | Source,
    out: str | Path,
    config: SVDQConfig,
    **run: Unpack[Sizing],
) -> Estimate:
    """Estimate `quantize_checkpoint` with the same arguments; writes nothing.

    Args:
        model: a folder, the Hub's user/model, or a `Source`.
        out: folder of the output.
        config: how the model would be quantized.
        **run: see `Sizing`.

    Raises:
        TypeError: an argument is of a wrong type (`WrongKind`, which is a ValueError as well).
        ValueError: what `quantize_checkpoint` would refuse before its work starts, or in a sampled layer.
    """
    check_target(out)
    workers, dtype = run.get("workers", 1), run.get("dtype")
    check_workers(workers)
    check_dtype(dtype)
    size, source = parse_size(run.get("shard_size", SHARD_SIZE)), Source.resolve(model)
    work = unfinished_folder(out)
    check_own(work)
    source.check()
    before, free = source.bytes, free_bytes(Path(out).absolute().parent)
    try:
        plan = make_plan(source, config, size, dtype, has_data=run.get("batches") is not None)
    except Unstreamable as reason:
        check_loss(source.empty, config)
        after = reason.footprint or _sizes_beside_data(source, config, size, dtype)
        disk = before if reason.footprint is None else reason.footprint.total_bytes  # as the run asks for
        return Estimate(before, after, None, None, disk, free, in_memory=str(reason))
    idle = peak_memory()
    seconds, sampled = _measured(plan)
    peak = peak_memory() + _stack_bytes(plan)
    memory = peak if workers == 1 else idle + workers * peak
    disk = bytes_needed(plan, work)
    return Estimate(before, plan.footprint, seconds / workers, memory, disk, free, tuple(sampled))


def _sizes_beside_data(
    source: Source, config: SVDQConfig, shard_size: int, dtype: str | None
) -> Footprint | None:
    """Sizes of a model that data is needed for, which are those that it has without; None: not known."""
    if not config.data_needs or config.activations is not None or config.target_bits is not None:
        return None
    try:
        return make_plan(source, config.without_data(), shard_size, dtype, has_data=False).footprint
    except Unstreamable as reason:
        return reason.footprint


def _measured(plan: StreamPlan) -> tuple[float, list[str]]:
    """Estimated seconds for all weights, and the names of the weights of which one matrix was measured."""
    units = {unit.weight: unit for shard in plan.shards for unit in shard.units if unit.weight is not None}
    count: Counter[tuple[int, ...]] = Counter()
    for weight in units:
        count[weight.shape[-2:]] += math.prod(weight.shape)
    largest = max(count, key=math.prod)
    shapes = [largest, *(shape for shape, _ in count.most_common() if shape != largest)][:SAMPLES]
    rates: dict[tuple[int, ...], float] = {}
    sampled = []
    for shape in shapes:
        weight = next(weight for weight in units if weight.shape[-2:] == shape)
        rates[shape] = _seconds(units[weight], plan.config) / max(1, math.prod(shape))
        sampled.append(weight.name)
    others = sum(rates.values()) / len(rates)
    return sum(weights * rates.get(shape, others) for shape, weights in count.items()), sampled


def _seconds(unit: Unit, config: SVDQConfig) -> float:
    """Time to read and quantize one matrix."""
    started = time.perf_counter()
    dense = next(unit.matrices())
    name = unit.weight.name if unit.weight is not None else ""
    quantize_weight(dense.T.contiguous() if unit.transposed else dense, config, name)
    return time.perf_counter() - started


def _stack_bytes(plan: StreamPlan) -> int:
    """Bytes of the largest packed stack of experts, which is in memory while it is made."""
    units = [unit for shard in plan.shards for unit in shard.units]
    return max((u.size for u in units if u.weight is not None and len(u.weight.shape) == 3), default=0)


def peak_memory() -> int:
    """The most bytes of memory that this process has used so far; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
