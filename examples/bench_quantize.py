"""What quantizing costs and keeps: the table "Measured" of the README.

    python examples/bench_quantize.py            # about five minutes, Markdown on standard output
    python examples/bench_quantize.py --busy     # one part of it: MiniLM beside busy processes

Each figure is taken in a process of its own. Answers are checked before anything is timed. The 200
sentences are the first 50 of four columns of GLUE's dev sets, found in $SVDQ_DATA or ../shared/data.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from svdq_hf import SVDQConfig, footprint, read_footprint
from svdq_hf.config.choices import VERSION_1
from svdq_hf.core.svd import principal
from svdq_hf.core.topk import top_positions
from svdq_hf.demo import default_model, embed

DATA = Path(os.environ.get("SVDQ_DATA", Path(__file__).parents[2] / "shared" / "data"))
SENTENCES = {
    "mrpc": "sentence1",
    "rte": "sentence2",
    "qnli": "sentence",
    "qnli ": "question",
}


def seconds(work: Callable[[], object], repeats: int) -> float:
    """Median time of one call, after one that does not count."""
    work()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def choice() -> None:
    """Block Krylov against exact: the weights chosen, and the time."""
    tensors = load_file(default_model() / "model.safetensors")
    matrices = [w for name, w in tensors.items() if w.ndim == 2 and "encoder.layer" in name]
    for k in (256, 4096):
        overlaps = []
        for weight in matrices:
            chosen = [
                {tuple(p) for p in torch.stack(top_positions(structure.matrix().abs(), k), 1).tolist()}
                for structure in (principal(weight, 8), principal(weight, 8, method="exact"))
            ]
            overlaps.append(len(chosen[0] & chosen[1]) / len(chosen[0] | chosen[1]))
        mean, worst = statistics.mean(overlaps), min(overlaps)
        row(f"Krylov's choice against exact, {len(matrices)} MiniLM matrices, k={k}, IoU",
            f"mean {mean:.4f}, worst {worst:.4f}", "mean >= 0.995, worst >= 0.98")  # fmt: skip
    for size, asked in ((2048, 20), (4096, 50)):
        weight = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
        ours = seconds(lambda weight=weight: principal(weight, 8), 5)
        started = time.perf_counter()
        torch.linalg.svd(weight)
        full = time.perf_counter() - started
        row(f"its time against `torch.linalg.svd`, {size} x {size}",
            f"1/{full / ours:.0f} ({ours:.3f} s, {full:.2f} s)", f"<= 1/{asked}")  # fmt: skip


def load() -> None:
    """Quantizing MiniLM on the fly against the plain load, and bits per weight on disk."""
    source, config = default_model(), SVDQConfig(k=256)
    _, report = AutoModel.from_pretrained(source, quantization_config=config, output_loading_info=True)
    wrong = sum(len(report[key]) for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    row("load report: missing, unexpected or mismatched keys", str(wrong), "0")
    plain = seconds(lambda: AutoModel.from_pretrained(source), 5)
    ours = seconds(lambda: AutoModel.from_pretrained(source, quantization_config=config), 5)
    row("MiniLM quantized on the fly", f"{ours:.2f} s (plain load {plain:.2f} s)",
        f"<= {3 * plain + 3:.2f} s (3 plain loads + 3 s)")  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        AutoModel.from_pretrained(source, quantization_config=config).save_pretrained(folder)
        stored = read_footprint(folder)
        inspecting = seconds(lambda: read_footprint(folder), 5)
    over = max(
        layer.bits_per_weight - 4.25 - 96 * layer.k / (layer.out * layer.in_features)
        for layer in stored.layers
    )
    row("bits per weight on disk, mean; most above 4.25 + 96 k / (out in)",
        f"{stored.bits_per_weight:.3f}; {over:.3f}", "<= 0.02 above")  # fmt: skip
    row("reading a folder's footprint (`svdq inspect` without the imports)", f"{inspecting:.3f} s", "<= 1 s")


def busy() -> None:
    """MiniLM quantized in a fresh process, as many threads as torch takes, beside none and some busy ones."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    for others in (0, 1, os.cpu_count() or 1):
        spinning = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(others)]
        try:
            text = subprocess.run(
                [sys.executable, __file__, "--once"],
                check=True, capture_output=True, text=True, env=environment,
            ).stdout  # fmt: skip
        finally:
            for one in spinning:
                one.kill()
        wall, processor = json.loads(text)
        row(f"MiniLM quantized while loading, beside {others} busy processes",
            f"{wall:.1f} s ({processor:.1f} s of processor time)", "<= 3 s beside one")  # fmt: skip


def once() -> None:
    """Print the seconds, and those of the processor, that loading and quantizing MiniLM takes."""
    AutoModel.from_pretrained(default_model())  # imports its code
    started, used = time.perf_counter(), time.process_time()
    AutoModel.from_pretrained(default_model(), quantization_config=SVDQConfig())
    print(json.dumps([time.perf_counter() - started, time.process_time() - used]))


def sentences() -> None:
    """Embeddings of 200 real sentences against FP32's, at the defaults and beside them."""
    source = default_model()
    tokenizer = AutoTokenizer.from_pretrained(source)
    texts = [
        json.loads(line)[column]
        for task, column in SENTENCES.items()
        for line in (DATA / "glue" / task.strip() / "dev.jsonl").read_text().splitlines()[:50]
    ]
    before = embed(AutoModel.from_pretrained(source), tokenizer, texts)
    variants = {
        "defaults": SVDQConfig(),
        "saliency='magnitude'": SVDQConfig(saliency="magnitude"),
        "saliency='relative'": SVDQConfig(saliency="relative"),
        "saliency='random'": SVDQConfig(saliency="random"),
        "k=0": SVDQConfig(k=0),
        "k=4096": SVDQConfig(k=4096),
        "SVDQConfig.best()": SVDQConfig.best(),
        "SVDQConfig.small()": SVDQConfig.small(),
        "levels='linear'": SVDQConfig(levels="linear"),
        "column_scale=False": SVDQConfig(column_scale=False),
        "group_size=64": SVDQConfig(group_size=64),
        "bits=8": SVDQConfig(bits=8),
        "bits=3": SVDQConfig(bits=3),
        "bits=3, best()": SVDQConfig.best(bits=3),
        "scale='absmax'": SVDQConfig(scale="absmax"),
        "format version 1, group_size=64": SVDQConfig(group_size=64, **VERSION_1),
        "paper()": SVDQConfig.paper(),
        "embeddings=True": SVDQConfig(embeddings=True),
        "target_bits=4.3978": SVDQConfig(target_bits=4.3978),
        "best(target_bits=4.486)": SVDQConfig.best(target_bits=4.486),
    }
    for name, config in variants.items():
        model = AutoModel.from_pretrained(source, quantization_config=config)
        after = embed(model, tokenizer, texts)
        cosine = torch.nn.functional.cosine_similarity(before, after, dim=-1).mean().item()
        row(f"embeddings of {len(texts)} real sentences, cosine to FP32, {name}",
            f"{cosine:.4f} at {footprint(model).bits_per_weight:.2f} bits{summed(model)}",
            ">= 0.97" if name == "defaults" else "")  # fmt: skip


def summed(model: torch.nn.Module) -> str:
    """What `target_bits` lowers: the layers' relative errors, and their squares, summed up."""
    errors = [layer.facts["relative_error"] for layer in footprint(model).layers]
    return f"; errors {sum(errors):.4f}, squared {sum(error**2 for error in errors):.4f}"


def memory() -> None:
    """Peak anonymous memory while a 200M-parameter Llama is quantized from disk."""
    config = LlamaConfig(
        vocab_size=32000, hidden_size=1024, intermediate_size=4096, num_hidden_layers=8,
        num_attention_heads=16, num_key_value_heads=16, tie_word_embeddings=False,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [sys.executable, __file__, "--write-llama", folder, json.dumps(config.to_dict())], check=True
        )
        for dtype in ("float32", "bfloat16"):
            text = subprocess.run(
                [sys.executable, __file__, "--peak", folder, dtype],
                check=True, capture_output=True, text=True,
            ).stdout  # fmt: skip
            parameters, largest, above = json.loads(text)
            row(f"peak anonymous memory while quantizing a {parameters / 1e6:.0f}M Llama in {dtype}, "
                "above the quantized model, in FP32 copies of its largest layer",
                f"{above / largest:.1f} ({above / 1e6:.0f} MB)", "<= 4")  # fmt: skip


def write_llama(folder: str, config: str) -> None:
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**json.loads(config))).save_pretrained(folder)


def peak(folder: str, dtype: str) -> None:
    """Print parameters, FP32 bytes of the largest quantized layer, and peak minus end."""
    highest, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            highest[0] = max(highest[0], anonymous())

    watcher = threading.Thread(target=watch)
    principal(torch.randn(512, 512), 8)  # thread pools and libraries come up before the count
    start = anonymous()
    watcher.start()
    model = LlamaForCausalLM.from_pretrained(
        folder, quantization_config=SVDQConfig(), dtype=getattr(torch, dtype)
    )
    done.set()
    watcher.join()
    result = footprint(model)
    largest = max(layer.out * layer.in_features for layer in result.layers) * 4
    dense = 0 if dtype == "float32" else result.dense_bytes  # FP32 tensors stay mapped from the file
    above = highest[0] - start - result.quantized_bytes - dense
    print(json.dumps([result.weights + 2 * 32000 * 1024, largest, above]))


def anonymous() -> int:
    """Anonymous resident bytes of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise OSError("this system does not tell anonymous memory: /proc/self/status has no RssAnon")


def row(what: str, value: str, asked: str) -> None:
    print(f"| {what} | {value} | {asked} |", flush=True)


def main() -> None:
    print(f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, {torch.get_num_threads()} threads, "
          f"torch {torch.__version__}\n\n| what | measured | asked |\n|---|---|---|", flush=True)  # fmt: skip
    for part in ("choice", "load", "busy", "sentences", "memory"):
        subprocess.run([sys.executable, __file__, f"--{part}"], check=True)


if __name__ == "__main__":
    logging.disable_progress_bar()
    parts = {
        "--choice": choice, "--load": load, "--busy": busy, "--once": once,
        "--sentences": sentences, "--memory": memory,
        "--write-llama": write_llama, "--peak": peak,
    }  # fmt: skip
    parts[sys.argv[1]](*sys.argv[2:]) if len(sys.argv) > 1 else main()
