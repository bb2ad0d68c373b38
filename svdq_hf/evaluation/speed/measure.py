"""Speed and memory of one model on this machine, measured in a fresh process.

Memory is resident memory above that of the interpreter with torch, transformers and the model's code
imported: in all, which counts pages of files that tensors still read from, and the anonymous part. Not here:
the process itself (`evaluation.speed.worker`).
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from svdq_hf.core.arguments import checked_arguments
from svdq_hf.core.grid_values import require
from svdq_hf.evaluation.speed.process import ModelProcess

ROUNDS = 3
"""Timed runs, after one that is not; the median counts."""


@dataclass(frozen=True)
class SpeedFacts:
    """What one model takes.

    Attributes:
        load_seconds: time of `from_pretrained`.
        load_peak_bytes: most resident memory while loading, above the interpreter's own; None where the
            system does not tell.
        load_peak_anonymous_bytes: the part that belongs to no file; None where the system does not tell.
        run_peak_bytes: most resident memory, the model's included, while a prompt is read and answered.
        run_peak_anonymous_bytes: the part of it that belongs to no file.
        prompt_tokens: what a forward pass was over: tokens, patches of a picture, frames of a sound.
        prefill_tokens_per_second: of a forward pass over all of them.
        decode_tokens_per_second: of `generate`, one new token after the other; None: the model writes none.
    """

    load_seconds: float
    load_peak_bytes: int | None
    load_peak_anonymous_bytes: int | None
    run_peak_bytes: int | None
    run_peak_anonymous_bytes: int | None
    prompt_tokens: int
    prefill_tokens_per_second: float
    decode_tokens_per_second: float | None

    def to_dict(self) -> dict[str, Any]:
        """All fields, in types that JSON has."""
        return asdict(self)


@checked_arguments(folder="a model's folder, or the Hub's user/model", dtype='such as "bfloat16"')
def measure_speed(
    folder: str | Path,
    *,
    dtype: str | None = None,
    prompt_tokens: int = 128,
    new_tokens: int = 32,
    threads: int | None = None,
) -> SpeedFacts:
    """Load a model in a fresh process, run it, and tell what that took.

    Args:
        folder: of a dense or quantized model, or its name on the Hub.
        dtype: of what is dense: "float32", "bfloat16" or "float16"; None: as stored.
        prompt_tokens: length of the prompt, cut to what the model has positions for.
        new_tokens: tokens that a model that writes answers with.
        threads: of torch; None: as many as torch takes by itself.

    Returns:
        Seconds, bytes and tokens a second; the times are medians of three runs.

    Raises:
        TypeError: an argument is of a wrong type (`WrongKind`, which is a ValueError as well).
        ValueError: an impossible number or dtype, or the model cannot be loaded or run; in one line.
    """
    require(dtype in (None, *DTYPES), "dtype", dtype, f"one of {DTYPES}, or None")
    for name, value, least in (("prompt_tokens", prompt_tokens, 1), ("new_tokens", new_tokens, 2)):
        require(value >= least, name, value, f"at least {least}")
    require(threads is None or threads >= 1, "threads", threads, "at least 1, or None")
    with ModelProcess(threads) as process:
        loaded = process.ask("load", folder=str(folder), dtype=dtype)
        run = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens}
        memory = process.ask("memory", **run)  # and what the first call pays for is paid
        prefills = [process.ask("prefill", tokens=prompt_tokens) for _ in range(ROUNDS)]
        decodes = [process.ask("decode", **run) for _ in range(ROUNDS)]
    return SpeedFacts(
        loaded["seconds"], loaded["resident"], loaded["anonymous"], memory["resident"], memory["anonymous"],
        prefills[0]["tokens"], median(map(_rate, prefills)),
        median(map(_rate, decodes)) if decodes[0]["tokens"] else None,
    )  # fmt: skip


DTYPES = ("float32", "bfloat16", "float16")


def _rate(timed: dict[str, Any]) -> float:
    return float(timed["tokens"] / timed["seconds"])
