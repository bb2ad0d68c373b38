"""Bench of one model on this machine: quantized, dense and by other methods, in turn, a process each.

A round asks every variant for every figure, one after the other, so that what disturbs the machine for a
while disturbs all of them. Not here: medians and ratios (`evaluation.speed.bench_result`), the tables
(`cli.bench_tables`).
"""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from svdq_hf.checkpoint.source import Source
from svdq_hf.config import SVDQConfig
from svdq_hf.core.grid_values import require
from svdq_hf.evaluation.speed.bench_result import DECODE, BenchResult, Measured
from svdq_hf.evaluation.speed.memory import free_memory
from svdq_hf.evaluation.speed.process import ModelProcess
from svdq_hf.evaluation.speed.variants import Variant, variants

TOKENS = (8, 64, 512)
NEW_TOKENS, PROMPT = 16, 32
Say = Callable[[str], None]


@dataclass(frozen=True)
class BenchRequest:
    """What is measured.

    Attributes:
        folder: of a dense or quantized model, or its name on the Hub.
        dense: of the same model, dense; None: made of the quantized one.
        config: by which a dense model is quantized on the way.
        tokens: lengths of a forward pass.
        seconds: how long rounds are begun; at least one is.
        only: words of the variants that are wanted; empty: all.
        threads: of torch; None: as many as torch takes by itself.

    Raises:
        ValueError: an impossible number.
    """

    folder: str | Path
    dense: str | Path | None = None
    config: SVDQConfig = field(default_factory=SVDQConfig)
    tokens: Sequence[int] = TOKENS
    seconds: float = 40.0
    only: Sequence[str] = ()
    threads: int | None = None

    def __post_init__(self) -> None:
        require(len(self.tokens) > 0 and min(self.tokens) >= 1, "tokens", self.tokens, "numbers from 1 on")
        require(self.seconds >= 0, "seconds", self.seconds, "0 or more")
        require(self.threads is None or self.threads >= 1, "threads", self.threads, "at least 1, or None")


def run_bench(request: BenchRequest, say: Say = lambda text: None) -> BenchResult:
    """Measure a model's variants in turn.

    Args:
        request: what is measured.
        say: called with a line before each thing that takes long.

    Raises:
        ValueError: the folder's own model cannot be loaded or run, in one line; other variants that cannot
            be are told in the result.
    """
    source = Source.resolve(request.folder)
    method = (source.stored.get("quantization_config") or {}).get("quant_method")
    dense = Source.resolve(request.dense).folder if request.dense is not None else None
    wanted = variants(source.folder, method, dense, request.config, tuple(request.only))
    with ExitStack() as stack:
        running = _Running(request, stack, say)
        for variant in wanted:
            running.start(variant)
        first = next(iter(running.loaded.values()), None)
        if first is None:
            told = [f"{name}: {why}" for name, why in running.missing.items()]
            raise ValueError("; ".join(told) or "no variant is wanted")
        own = next(iter(running.processes.values()))
        shares = own.ask("shares", prompt_tokens=PROMPT, new_tokens=NEW_TOKENS)
        lengths = sorted({1, *request.tokens})
        paths = own.ask("paths", tokens=lengths)["paths"]
        rounds = running.rounds(request.seconds)
    return BenchResult(
        model=str(source), kind=first["kind"], parameters=running.parameters, stored_bytes=source.bytes,
        threads=first["threads"], figures=running.figures, variants=running.measured, shares=shares,
        paths=paths, missing=running.missing, rounds=rounds,
    )  # fmt: skip


class _Running:
    """Processes of the variants, and what was measured of them so far."""

    def __init__(self, request: BenchRequest, stack: ExitStack, say: Say) -> None:
        self.request, self.stack, self.say = request, stack, say
        self.processes: dict[str, ModelProcess] = {}
        self.loaded: dict[str, dict[str, Any]] = {}
        self.measured: dict[str, Measured] = {}
        self.missing: dict[str, str] = {}

    @property
    def figures(self) -> list[str]:
        writes = any(one["writes"] for one in self.loaded.values())
        return [*([DECODE] if writes else []), *map(str, self.request.tokens)]

    @property
    def parameters(self) -> int:
        """Weights of the model: the most that a variant tells, as other methods count packed ones."""
        return max((int(one["parameters"]) for one in self.loaded.values()), default=0)

    def start(self, variant: Variant) -> None:
        """Load a variant in a process of its own; where that fails and others may do, note why."""
        missing = variant.missing or self._too_large(variant)
        if missing is not None:
            self.missing[variant.name] = missing
            return
        self.say(f"loading {variant.name}")
        process = self.stack.enter_context(ModelProcess(self.request.threads))
        try:
            loaded = process.ask("load", **variant.load)
            peak = process.ask("memory", prompt_tokens=max(self.request.tokens), new_tokens=2)["resident"]
        except ValueError as error:
            process.end()
            self.missing[variant.name] = str(error)
            if variant.word == "svdq":
                raise
            return
        told = loaded if variant.loads_as_users_do else {"seconds": None, "resident": None}
        self.processes[variant.word], self.loaded[variant.word] = process, loaded
        self.measured[variant.word] = Measured(
            variant.name, told["seconds"], told["resident"], peak, maps_dense=variant.maps_dense
        )

    def _too_large(self, variant: Variant) -> str | None:
        """Why a variant does not fit into the memory that is free; None: it may."""
        needed, free = variant.weight_bytes * self.parameters, free_memory()
        if free is None or needed <= free:
            return None
        return f"needs {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} are free"

    def rounds(self, seconds: float) -> int:
        """Rounds until the time is up, at least one; returns how many."""
        started, count = time.perf_counter(), 0
        while count == 0 or (time.perf_counter() - started) * (count + 1) / count <= seconds:
            self.say(f"round {count + 1}")
            for figure in self.figures:
                for word, process in self.processes.items():
                    timed = _asked(process, figure)
                    if timed["tokens"]:
                        rates = self.measured[word].rates.setdefault(figure, [])
                        rates.append(timed["tokens"] / timed["seconds"])
            count += 1
        return count


def _asked(process: ModelProcess, figure: str) -> dict[str, Any]:
    if figure == DECODE:
        return process.ask(DECODE, prompt_tokens=PROMPT, new_tokens=NEW_TOKENS)
    return process.ask("prefill", tokens=int(figure))
