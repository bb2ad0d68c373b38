"""Speed of vLLM's engine with several folders of one model: one request alone, and several at once.

    export SVDQ_VLLM_PYTHON=/path/to/vllm's/environment/bin/python
    python examples/bench_vllm.py DENSE QUANTIZED... --options "--enforce-eager"

Each folder gets a server of its own, one after the other. The first is the base of the ratios: let it be the
dense model in bfloat16. A row tells, for 1, 8 and 32 requests at once, the new tokens of all of them a
second, the median of a few rounds. Prompts are random tokens; none comes twice, so that nothing is cached.
"""

import argparse
import os
import random
import shlex
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path

from vllm_server import VllmServer

PROMPT = 16
"""Tokens of a prompt: short, so that it is decoding that is measured."""


def main() -> None:
    """Time each folder, and print a row of a table for it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", metavar="FOLDER")
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 8, 32], metavar="N")
    parser.add_argument("--tokens", type=int, default=32, help="new tokens of each request")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--options", default="--max-model-len 512", help="of vllm serve, one text")
    chosen = parser.parse_args()
    print(f"{date.today()}, {os.cpu_count()} cores: new tokens a second, {chosen.tokens} of each request\n")
    print(f"| folder | {' | '.join(f'{count} at once' for count in chosen.requests)} |")
    print("|---|" + "---|" * len(chosen.requests), flush=True)
    base: list[float] = []
    for folder in chosen.folders:
        with VllmServer(folder, *shlex.split(chosen.options)) as server:
            found = [speed(server, count, chosen.tokens, chosen.rounds) for count in chosen.requests]
        base = base or found
        print(row(Path(folder).name, found, base), flush=True)


def row(name: str, found: Sequence[float], base: Sequence[float]) -> str:
    """A line of the table: tokens a second, and the ratio to the base."""
    cells = [f"{one:.1f} ({one / other:.2f})" for one, other in zip(found, base, strict=True)]
    return f"| {name} | {' | '.join(cells)} |"


def speed(server: VllmServer, count: int, tokens: int, rounds: int) -> float:
    """New tokens a second of several requests at once, the median of some rounds after one to warm up."""
    draw = random.Random(count)
    found = []
    for _ in range(rounds + 1):
        asked = [[draw.randrange(10, 80) for _ in range(PROMPT)] for _ in range(count)]
        begin = time.monotonic()
        with ThreadPoolExecutor(count) as threads:
            told = list(threads.map(lambda prompt: server.complete(prompt, tokens), asked))
        found.append(sum(len(one["token_ids"]) for one in told) / (time.monotonic() - begin))
    return statistics.median(found[1:])


if __name__ == "__main__":
    main()
