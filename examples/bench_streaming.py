"""A checkpoint of any size, streamed in little memory: the table of "Any size" in the README.

    python examples/bench_streaming.py --folder DIR                # 7B: 17 GB of disk, tens of minutes
    python examples/bench_streaming.py --folder DIR --layers 1     # one layer of the same widths

Writes a random Llama checkpoint into DIR, file by file in little memory (once: it is used again), and
streams it in a process of its own. Then, on one layer of each shape: the time of each step, and of peers
that can be imported, which quantize the same weights in bfloat16. Markdown on standard output; --workers N
streams with so many processes, and the memory told is the largest of them.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from linear_peers import BF16, CONTENDERS
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from svdq_hf import SVDQConfig, read_footprint
from svdq_hf.checkpoint.streaming.byte_ranges import header_bytes, layout, size_of
from svdq_hf.format.checks import check_parts
from svdq_hf.format.files import INDEX
from svdq_hf.format.parts import PartSpec
from svdq_hf.quantize.encoding import encoded
from svdq_hf.quantize.prepared import Prepared, choose

FILE_BYTES = 2_000_000_000
PIECE = 1 << 24
PEERS = ("bitsandbytes nf4, bf16 in", "hqq, bf16 in")
PEERS_LAYERS = ("q_proj", "down_proj")
"""Of the sampled layers, those that peers quantize: HQQ is slow on a CPU."""


def seven_billion(layers: int) -> LlamaConfig:
    """The widths of Llama 7B."""
    return LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=32,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )


def write_checkpoint(folder: Path, config: LlamaConfig) -> None:
    """Random weights in bfloat16, in files of `FILE_BYTES`; no tensor is ever there as a whole."""
    if (folder / "config.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        tensors = LlamaForCausalLM(config).state_dict()
    groups: list[dict[str, PartSpec]] = [{}]
    for name, tensor in tensors.items():
        spec = PartSpec(tuple(tensor.shape), torch.bfloat16)
        if groups[-1] and sum(map(size_of, groups[-1].values())) + size_of(spec) > FILE_BYTES:
            groups.append({})
        groups[-1][name] = spec
    where = {}
    for number, group in enumerate(groups, 1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        where |= dict.fromkeys(group, file)
        _write_file(folder / file, group)
    index = {"metadata": {"total_size": 0}, "weight_map": where}
    (folder / INDEX).write_text(json.dumps(index))
    config.save_pretrained(folder)


def _write_file(path: Path, tensors: dict[str, PartSpec]) -> None:
    with open(path, "wb") as file:
        file.write(header_bytes(tensors, {"format": "pt"}))
        for name in layout(tensors):
            left = size_of(tensors[name]) // 2
            while left:
                piece = torch.randn(min(left, PIECE)).mul_(0.02).to(torch.bfloat16)
                file.write(piece.view(torch.uint8).numpy().data)
                left -= piece.numel()


def stream(source: Path, out: Path, workers: int) -> tuple[float, int]:
    """Seconds, and the most bytes that a process of it held."""
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "svdq_hf", "quantize", str(source), str(out), "--workers", str(workers)]
    started = time.perf_counter()
    subprocess.run(command, check=True)
    seconds = time.perf_counter() - started
    return seconds, 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss


def steps(weight: Tensor, config: SVDQConfig) -> dict[str, float]:
    """Seconds of each step of quantizing one weight; the result is checked."""
    times: dict[str, float] = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        result = work()
        times[name] = time.perf_counter() - started
        return result

    prepared = Prepared(weight, config)
    timed("check of values", lambda: prepared.top)
    timed("column scale", lambda: prepared.column_scale)
    rows, columns, _ = timed("which weights are salient", lambda: choose(prepared))
    parts, error = timed(
        "rounding, and what was lost", lambda: encoded(prepared, prepared.top, rows, columns)
    )
    check_parts(parts, weight.shape[1], config.scheme)
    assert 0.05 < error < 0.09, error
    return times


def layers_of_each_shape(source: Path) -> dict[str, Tensor]:
    """The weights of one layer's linear layers."""
    where = json.loads((source / INDEX).read_text())["weight_map"]
    names = [name for name in where if name.startswith("model.layers.0.") and "proj" in name]
    return {name: load_file(source / where[name])[name].clone() for name in names}


def peer_seconds(name: str, weights: dict[str, Tensor]) -> float | None:
    """Seconds that a peer takes for these weights; None where it cannot be imported."""
    contender = CONTENDERS[name]
    if contender.missing() is not None:
        return None
    contender.make(next(iter(weights.values()))[:64], BF16)  # what is done once
    started = time.perf_counter()
    for weight in weights.values():
        contender.make(weight, BF16)
    return time.perf_counter() - started


def main() -> None:
    """Everything, as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    source, out = options.folder / f"dense-{options.layers}", options.folder / f"svdq-{options.layers}"
    started = time.perf_counter()
    write_checkpoint(source, seven_billion(options.layers))
    print(f"checkpoint written in {time.perf_counter() - started:.0f} s", file=sys.stderr)
    seconds, peak = stream(source, out, options.workers)
    found = read_footprint(out)
    billions = found.weights / 1e9
    print(f"{torch.get_num_threads()} threads, {options.workers} workers, {options.layers} layers\n")
    print("| what | measured |\n|---|---|")
    before = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    print(f"| bytes | {before / 1e9:.2f} GB -> {found.total_bytes / 1e9:.2f} GB |")
    print(f"| bits per weight | {found.bits_per_weight:.3f} |")
    print(f"| time | {seconds / 60:.1f} min |")
    print(f"| peak memory of a process | {peak / 1e9:.2f} GB |")
    print(f"| seconds per billion weights, all told | {seconds / billions:.1f} |")
    weights = layers_of_each_shape(source)
    sampled = sum(weight.numel() for weight in weights.values()) / 1e9
    config = SVDQConfig()
    steps(weights[next(iter(weights))][:512], config)  # what is done once
    total: dict[str, float] = {}
    for weight in weights.values():
        for name, taken in steps(weight, config).items():
            total[name] = total.get(name, 0) + taken
    for name, taken in total.items():
        print(f"| {name}, seconds per billion | {taken / sampled:.1f} |")
    weights = {name: weight for name, weight in weights.items() if any(part in name for part in PEERS_LAYERS)}
    sampled = sum(weight.numel() for weight in weights.values()) / 1e9
    for name in PEERS:
        taken = peer_seconds(name, weights)
        told = "not there" if taken is None else f"{taken / sampled:.1f}"
        print(f"| {name.removesuffix(', bf16 in')}, seconds per billion | {told} |")


if __name__ == "__main__":
    main()
