"""How fast a whole language model generates on this CPU, dense and quantized, and what memory it takes.

    python examples/bench_generate.py --model FOLDER          # e.g. Gemma 3 270M: a few minutes
    python examples/bench_generate.py --llama-1b              # random weights in the shape of Llama 3.2 1B
    python examples/bench_generate.py --model FOLDER --only fp32 "svdq, head" --rounds 5
    python examples/bench_generate.py --model FOLDER --gguf FILE      # beside llama.cpp on the same model

Each variant runs in a process of its own, one after the other, round after round; a figure is the median of
the rounds, the ratio is to dense FP32. Decoding: 32 new tokens after a prompt of 32, greedy. Prefill: one
forward pass over 512 tokens. Memory is the process's peak, loading and quantizing included: what is stored is
in the last column. Which entries are salient does not change the time, so they are random.

The peers are optional: pip install bitsandbytes torchao llama-cpp-python.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from svdq_hf import SVDQConfig

NEW, PROMPT, PREFILL = 32, 32, 512
LLAMA_1B = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "tie_word_embeddings": True,
}  # fmt: skip


def _bitsandbytes() -> Any:
    from transformers import BitsAndBytesConfig

    nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
    return BitsAndBytesConfig(load_in_4bit=True, **nf4)


def _torchao() -> Any:
    from torchao.prototype.quantization.int4.inference_workflow import PrototypeInt4WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(PrototypeInt4WeightOnlyConfig(group_size=64))  # the one that runs on a CPU


def _svdq(**choices: Any) -> Callable[[], SVDQConfig]:
    return lambda: SVDQConfig(saliency="random", **choices)


BASELINE = "fp32"
VARIANTS: dict[str, tuple[torch.dtype, Callable[[], Any]]] = {
    BASELINE: (torch.float32, lambda: None),
    "bf16": (torch.bfloat16, lambda: None),
    "svdq": (torch.float32, _svdq()),
    "svdq, head": (torch.float32, _svdq(lm_head=True)),
    "svdq, head, fast": (torch.float32, _svdq(lm_head=True, compute="fast")),
    "svdq, head, bf16": (torch.bfloat16, _svdq(lm_head=True)),
    "bitsandbytes nf4, bf16": (torch.bfloat16, _bitsandbytes),
    "torchao int4, bf16": (torch.bfloat16, _torchao),
}
"""Dtype of the activations, and quantization config, by name."""


LLAMA_CPP = "llama.cpp"


def measure_llama_cpp(file: str) -> dict[str, float]:
    """The same of a GGUF file, by llama.cpp, whose tokens cost no Python but the sampling's."""
    from llama_cpp import Llama

    threads = torch.get_num_threads()
    model = Llama(
        file, n_ctx=1024, n_batch=PREFILL, n_threads=threads, n_threads_batch=threads, verbose=False
    )
    ids = torch.randint(10, 1000, (PREFILL,), generator=torch.Generator().manual_seed(0)).tolist()

    def generate() -> None:
        model.reset()
        model.eval(ids[:PROMPT])
        for _ in range(NEW - 1):
            model.eval([model.sample(temp=0.0)])
        model.sample(temp=0.0)

    def prefill() -> None:
        model.reset()
        model.eval(ids)

    generate()
    return {
        "decode": NEW / min(_seconds(generate) for _ in range(2)),
        "prefill": PREFILL / min(_seconds(prefill) for _ in range(3)),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
        "stored_mb": Path(file).stat().st_size / 1e6,
    }


def measure(folder: str, variant: str) -> dict[str, float]:
    """Load a model as `variant` and time it, in this process."""
    if variant == LLAMA_CPP:
        return measure_llama_cpp(folder)
    dtype, config = VARIANTS[variant]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=config())
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, 1000, (1, PREFILL), generator=generator)

    def generate() -> None:
        model.generate(ids[:, :PROMPT], max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)

    with torch.no_grad():
        generate()  # warm up, as the first call pays for what the rest keeps
        decode = min(_seconds(generate) for _ in range(2))
        prefill = min(_seconds(lambda: model(ids)) for _ in range(3))
    stored = {id(part): part.nbytes for part in model.state_dict(keep_vars=True).values()}
    return {
        "decode": NEW / decode,
        "prefill": PREFILL / prefill,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
        "stored_mb": sum(stored.values()) / 1e6,
    }


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def measured_apart(folder: str, variant: str) -> dict[str, float] | str:
    """The figures of `measure` in a new process; or why there are none."""
    command = [sys.executable, "-W", "ignore", __file__, "--model", folder, "--child", variant]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["no message"])[-1]
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def table(name: str, rounds: dict[str, list[dict[str, float]]]) -> str:
    """A Markdown table: medians, and ratios to FP32."""
    medians = {
        variant: {key: statistics.median(one[key] for one in found) for key in found[0]}
        for variant, found in rounds.items()
    }
    base = medians[BASELINE]
    lines = [
        f"| {name} | decode, tokens/s | prefill, tokens/s | peak MB | stored MB |",
        "|---|---|---|---|---|",
    ]
    for variant, found in medians.items():
        decode, prefill = (f"{found[k]:.1f} ({found[k] / base[k]:.2f}x)" for k in ("decode", "prefill"))
        lines.append(
            f"| {variant} | {decode} | {prefill} | {found['peak_mb']:.0f} | {found['stored_mb']:.0f} |"
        )
    return "\n".join(lines)


def random_llama(folder: str) -> str:
    """Write a Llama of the shape of 3.2 1B with random weights."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**LLAMA_1B)).to(torch.bfloat16).save_pretrained(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", help="folder of a dense causal language model")
    parser.add_argument("--llama-1b", action="store_true", help="random weights in the shape of Llama 3.2 1B")
    parser.add_argument("--gguf", help="the same model as a GGUF file, for llama.cpp")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", choices=[*VARIANTS, LLAMA_CPP], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options.model, options.child)))
        return
    if not (options.model or options.llama_1b):
        parser.error("which model? --model FOLDER or --llama-1b")
    variants = [BASELINE, *(variant for variant in options.only if variant != BASELINE)]
    variants += [LLAMA_CPP] if options.gguf else []
    print(f"{date.today()}, {platform.processor() or platform.machine()}, {os.cpu_count()} cores, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}")  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.model or random_llama(scratch)
        rounds: dict[str, list[dict[str, float]]] = {}
        for _ in range(options.rounds):
            for variant in list(variants):
                found = measured_apart(options.gguf if variant == LLAMA_CPP else folder, variant)
                if isinstance(found, str):
                    print(f"{variant}: not here ({found})")
                    variants.remove(variant)
                    rounds.pop(variant, None)
                else:
                    rounds.setdefault(variant, []).append(found)
        if BASELINE not in rounds:
            raise SystemExit("without the dense model there is nothing to compare with")
        print(table("Llama 1B, random" if options.llama_1b else Path(folder).name, rounds))


if __name__ == "__main__":
    main()
