"""What quantizing fused experts keeps and costs: the table "Experts" of the README.

    python examples/bench_experts.py            # about two minutes, Markdown on standard output

Share and bits are of tiny random models, and bits of the true shapes by the format's own sizes; peak memory
is that of a Mixtral of 2 layers, 8 experts and 176 million weights in them, a process for each figure.
"""

import json
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import torch
import transformers as hf
from transformers.utils import logging

from svdq_hf import SVDQConfig, footprint, quantize_model
from svdq_hf.format.parts import part_specs
from svdq_hf.nn.expert_layouts import layout_of

TINY = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 96,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES = {
    "Mixtral": (hf.MixtralForCausalLM, hf.MixtralConfig, "num_local_experts"),
    "Qwen3-MoE": (hf.Qwen3MoeForCausalLM, hf.Qwen3MoeConfig, "num_experts"),
    "gpt-oss": (hf.GptOssForCausalLM, hf.GptOssConfig, "num_local_experts"),
}
TRUE_SHAPES = {
    "Mixtral": ("Mixtral 8x7B", (28672, 4096), (4096, 14336)),
    "Qwen3-MoE": ("Qwen3 30B-A3B", (1536, 2048), (2048, 768)),
    "gpt-oss": ("gpt-oss 20B", (5760, 2880), (2880, 2880)),
}
PEAK = {
    "vocab_size": 64, "hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 2,
    "num_attention_heads": 8, "num_key_value_heads": 2, "num_local_experts": 8,
}  # fmt: skip


def tiny_row(family: str) -> str:
    """Share of expert weights quantized, and bits, of a tiny model; bits of the true shapes."""
    model_class, config_class, count = FAMILIES[family]
    torch.manual_seed(0)
    model = model_class(config_class(**TINY, **{count: 4}))
    fused = [module for module in model.modules() if layout_of(module) is not None]
    dense = sum(p.numel() for module in fused for p in module.parameters() if p.ndim == 3)
    config = SVDQConfig()
    layers = [layer for layer in footprint(quantize_model(model, config)).layers if layer.experts is not None]
    packed = sum(layer.weights for layer in layers)
    bits = 8 * sum(layer.stored_bytes for layer in layers) / packed
    name, *shapes = TRUE_SHAPES[family]
    true = sum(stored_bits(*shape, config) for shape in shapes) / sum(out * width for out, width in shapes)
    return f"| {family} | {packed / dense:.0%} | {bits:.2f} | {name}: {true:.3f} |"


def stored_bits(out: int, in_features: int, config: SVDQConfig) -> int:
    """Of one matrix, everything counted."""
    specs = part_specs(out, in_features, config.scheme).values()
    return sum(8 * torch.Size(shape).numel() * dtype.itemsize for shape, dtype in specs)


def memory(dtype: str) -> dict[str, float]:
    """Bytes while experts are quantized on load, measured by `peak` in processes of its own."""
    with tempfile.TemporaryDirectory() as folder:
        for step in ("--write", "--peak"):
            done = subprocess.run(
                [sys.executable, __file__, step, folder, dtype], check=True, capture_output=True, text=True
            )
    found: dict[str, float] = json.loads(done.stdout)
    return found


def write(folder: str, dtype: str) -> None:
    """Save a random Mixtral."""
    torch.manual_seed(0)
    model = hf.MixtralForCausalLM(hf.MixtralConfig(**PEAK))
    model.to(getattr(torch, dtype)).save_pretrained(folder)


def peak(folder: str, dtype: str) -> None:
    """Print peak anonymous memory above the start, and what it is compared with."""
    highest, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            highest[0] = max(highest[0], anonymous())

    expert = torch.nn.Linear(PEAK["hidden_size"], 2 * PEAK["intermediate_size"], bias=False)
    quantize_model(torch.nn.Sequential(torch.nn.Linear(512, 512)), SVDQConfig())  # libraries come up
    watcher = threading.Thread(target=watch)
    start = highest[0] = anonymous()
    watcher.start()
    quantize_model(torch.nn.Sequential(expert), SVDQConfig())
    work, highest[0] = highest[0] - start, 0
    del expert
    start = anonymous()
    model = hf.MixtralForCausalLM.from_pretrained(
        folder, quantization_config=SVDQConfig(), dtype=getattr(torch, dtype)
    )
    done.set()
    watcher.join()
    layers = [layer for layer in footprint(model).layers if layer.experts is not None]
    layer = sum(one.weights for one in layers) // PEAK["num_hidden_layers"] * getattr(torch, dtype).itemsize
    figures = {
        "peak": highest[0] - start,
        "quantized": footprint(model).total_bytes,
        "work": work,
        "layer": layer,
    }
    print(json.dumps(figures))


def anonymous() -> int:
    """Anonymous resident bytes of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise OSError("this system does not tell anonymous memory: /proc/self/status has no RssAnon")


def main() -> None:
    print("| tiny model | expert weights quantized | bits per weight | bits of the true shapes |")
    print("|---|---|---|---|")
    for family in FAMILIES:
        print(tiny_row(family), flush=True)
    print("\n| Mixtral, 2 layers, 8 experts, MB | peak | quantized + one expert's work + a dense layer |")
    print("|---|---|---|")
    for dtype in ("float32", "bfloat16"):
        found = {name: size / 1e6 for name, size in memory(dtype).items()}
        bound = found["quantized"] + found["work"] + found["layer"]
        parts = " + ".join(f"{found[name]:.0f}" for name in ("quantized", "work", "layer"))
        print(f"| {dtype} | {found['peak']:.0f} | {parts} = {bound:.0f} |", flush=True)


if __name__ == "__main__":
    logging.disable_progress_bar()
    steps = {"--write": write, "--peak": peak}
    steps[sys.argv[1]](*sys.argv[2:]) if len(sys.argv) > 1 else main()
