"""How long loading takes while it quantizes: this package beside bitsandbytes NF4 and beside no quantizing.

    python examples/bench_loading.py FOLDER            # a causal model, FP32; a process for each load
    python examples/bench_loading.py FOLDER bfloat16 --rounds 5

Ways take turns, so that a busy machine slows all alike; figures are medians of wall time and of processor
time, and the ratio to NF4 of both. The peer is optional: pip install bitsandbytes.
"""

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import time

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.utils import logging

from svdq_hf import SVDQConfig

NF4 = "bitsandbytes NF4"
CONFIGS = {
    "dense": lambda: None,
    NF4: lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "SVDQConfig()": SVDQConfig,
    "SVDQConfig.best()": SVDQConfig.best,
    "SVDQConfig(lm_head=True)": lambda: SVDQConfig(lm_head=True),
}


def load(folder: str, dtype: str, way: str) -> None:
    """Load once, and print the seconds of the clock and of the processor."""
    logging.disable_progress_bar()
    config = CONFIGS[way]()
    given = {} if config is None else {"quantization_config": config}
    if way == NF4:
        given["device_map"] = "cpu"
    started, processor = time.perf_counter(), time.process_time()
    AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), **given)
    print(json.dumps([time.perf_counter() - started, time.process_time() - processor]))


def measured(folder: str, dtype: str, way: str) -> list[float]:
    """What `load` printed in a process of its own."""
    command = [sys.executable, __file__, folder, dtype, "--way", way]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("dtype", nargs="?", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--way", choices=CONFIGS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        load(options.folder, options.dtype, options.way)
        return
    here = importlib.util.find_spec("bitsandbytes") is not None
    ways = [way for way in CONFIGS if way != NF4 or here]
    if not here:
        print(f"{NF4}: not here (pip install bitsandbytes)")
    found: dict[str, list[list[float]]] = {way: [] for way in ways}
    for _ in range(options.rounds):
        for way in ways:
            found[way].append(measured(options.folder, options.dtype, way))
    medians = {
        way: [statistics.median(each) for each in zip(*runs, strict=True)] for way, runs in found.items()
    }
    base = medians.get(NF4)
    titles = ("wall, s", "processor, s", "times NF4's: wall, processor")
    print(f"| {options.folder}, {options.dtype} | {' | '.join(titles)} |\n|{'---|' * 4}")
    for way, (wall, processor) in medians.items():
        times = "" if base is None else f"{wall / base[0]:.2f}, {processor / base[1]:.2f}"
        print(f"| {way} | {wall:.2f} | {processor:.2f} | {times} |")


if __name__ == "__main__":
    main()
