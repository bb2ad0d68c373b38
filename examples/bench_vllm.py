"""Speed of vLLM's engine with several folders of one model: one request alone, and several at once.

    ~/vllm/bin/python examples/bench_vllm.py DENSE QUANTIZED...     # vLLM's own Python: docs/vllm.md

All models are in one process, and take turns: what else the machine does then hits all of them, and the
ratios mean something. The first is their base: let it be the dense model. A cell tells the new tokens of all
requests a second, the median of some rounds. Prompts are random tokens; none comes twice, and nothing is
cached. There is no server in between: its part is the same for all.
"""

import argparse
import os
import random
import statistics
import time
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB, of each model
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) - 1)))  # as its server: one is left

PROMPT = 16
"""Tokens of a prompt: short, so that it is decoding that is measured."""


def main() -> None:
    """Time each folder with each number of requests, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", metavar="FOLDER")
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 8, 32], metavar="N")
    parser.add_argument("--tokens", type=int, default=32, help="new tokens of each request")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16", help="of activations, and of what is dense")
    parser.add_argument("--compile", action="store_true", help="compile the models, which takes minutes")
    chosen = parser.parse_args()
    engines = {folder: engine(folder, chosen.dtype, eager=not chosen.compile) for folder in chosen.folders}
    print(f"{date.today()}, {os.cpu_count()} cores: new tokens a second, {chosen.tokens} of each request\n")
    print("| requests at once | " + " | ".join(Path(folder).name for folder in engines) + " |")
    print("|---|" + "---|" * len(engines), flush=True)
    for count in chosen.requests:
        print(row(count, list(speeds(engines, count, chosen.tokens, chosen.rounds).values())), flush=True)


def engine(folder: str, dtype: str, *, eager: bool) -> Any:
    """An engine with the model of a folder."""
    from vllm import LLM

    choices = {"max_model_len": 512, "enable_prefix_caching": False, "enforce_eager": eager}
    return LLM(folder, dtype=dtype, **choices)


def row(count: int, found: Sequence[float]) -> str:
    """A line of the table: tokens a second, and the ratio to the first."""
    return f"| {count} | {' | '.join(f'{one:.1f} ({one / found[0]:.2f})' for one in found)} |"


def speeds(engines: Mapping[str, Any], count: int, tokens: int, rounds: int) -> dict[str, float]:
    """New tokens a second of several requests at once, by engine: medians of rounds after one to warm up."""
    draw = random.Random(count)
    found: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(rounds + 1):
        asked = [[draw.randrange(10, 80) for _ in range(PROMPT)] for _ in range(count)]
        for name, one in engines.items():
            found[name].append(count * tokens / seconds(one, asked, tokens))
    return {name: statistics.median(many[1:]) for name, many in found.items()}


def seconds(engine: Any, asked: Sequence[list[int]], tokens: int) -> float:
    """How long greedy answers of so many tokens take."""
    from vllm import SamplingParams

    choices = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    prompts = [{"prompt_token_ids": ids} for ids in asked]
    begin = time.perf_counter()
    engine.generate(prompts, choices, use_tqdm=False)
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
