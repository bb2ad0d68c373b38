"""What 4 bits cost in quality: ours beside other packages' own code, on the same layers and texts.

    python examples/bench_quality.py OUT --model FOLDER --text FILE [--context 1024 --tokens 8192]
    python examples/bench_quality.py OUT --model FOLDER --task rte --data DIR
    python examples/bench_quality.py OUT --model FOLDER --speech FILE --tokens 1024 --calibration 1024
    python examples/bench_quality.py OUT --table

Each cell is one JSON line of OUT/quality.jsonl; finished cells are not run again, so runs into one OUT add
up, and one that was killed goes on. Every method's weight is put, dequantized, into the dense model: what
is compared is the rounding, not anybody's kernel. KL is from the FP32 model, over all scored positions;
"same" is how often the top token is FP32's; intervals are a bootstrap's, over blocks of 64 tokens.
Methods that need data get the *end* of the text (or training texts), which is not scored.

The peers are optional: pip install bitsandbytes hqq sinq torchao optimum-quanto gguf llmcompressor.
sinq patches every Python process of its environment; SINQ_AUTO_PATCH=0 stops that.
"""

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from quality_peers import BASELINE, PEERS, Packed, Peer
from quality_speech import SpeechTask
from quality_tasks import SAMPLE, GlueTask, Task, TextTask
from torch import Tensor, nn
from transformers import (
    AutoFeatureExtractor,
    AutoModelForCausalLM,
    AutoModelForSpeechSeq2Seq,
    AutoTokenizer,
)
from transformers.utils import logging

from svdq_hf import SVDQConfig, quantize_model
from svdq_hf.calibration.inputs import InputStatistics, collect_inputs
from svdq_hf.config.choices import VERSION_1
from svdq_hf.evaluation.report.tables import change, number, small
from svdq_hf.evaluation.tasks.classification import classifier
from svdq_hf.evaluation.tasks.glue_tasks import task_of
from svdq_hf.nn.inventory import svdq_layers
from svdq_hf.quantize.selection import layers_to_convert

OURS: dict[str, Callable[[], SVDQConfig]] = {
    "svdq default": SVDQConfig,
    "svdq k=0": lambda: SVDQConfig(k=0),
    "svdq magnitude": lambda: SVDQConfig(saliency="magnitude"),
    "svdq random": lambda: SVDQConfig(saliency="random"),
    "svdq relative": lambda: SVDQConfig(saliency="relative"),
    "none of the switches": lambda: SVDQConfig(k=0, group_size=64, **VERSION_1),
    "normal levels": lambda: SVDQConfig(k=0, group_size=64, **{**VERSION_1, "levels": "normal"}),
    "column scale": lambda: SVDQConfig(k=0, group_size=64, **{**VERSION_1, "column_scale": True}),
    "group 32 of 8 bits": lambda: SVDQConfig(k=0, group_size=32, **{**VERSION_1, "scale_bits": 8}),
    "levels and columns": lambda: SVDQConfig(k=0, group_size=64, scale_bits=16),
    "svdq best": SVDQConfig.best,
    "svdq small": SVDQConfig.small,
    "svdq best, synthetic": lambda: SVDQConfig.best(error_feedback="synthetic"),
    "svdq self-calibrated": SVDQConfig.self_calibrated,
    "svdq, one budget": lambda: SVDQConfig(target_bits=4.31892),
    "svdq best, one budget": lambda: SVDQConfig.best(target_bits=4.46083),
    "svdq calibrated": SVDQConfig.calibrated,
    "svdq calibrated, ReQuant": lambda: SVDQConfig.calibrated(saliency="requant"),
    "svdq best, ReQuant": lambda: SVDQConfig.best(saliency="requant"),
    "svdq best, feedback": lambda: SVDQConfig.best(error_feedback=True),
    "svdq best, ReQuant and feedback": lambda: SVDQConfig.best(saliency="requant", error_feedback=True),
    "svdq paper": SVDQConfig.paper,
}
"""Our methods by name; a new one is a line here."""
FP32 = "fp32"


class Layer(NamedTuple):
    """A layer to quantize: its module, its weight `[out, in]` and some inputs `[tokens, in]` of it."""

    module: nn.Module
    weight: Tensor
    inputs: Tensor

    def put(self, weight: Tensor) -> None:
        """Give the module another weight."""
        stored: Tensor = self.module.weight
        stored.copy_(weight if isinstance(self.module, nn.Linear) else weight.T)

    def error(self, weight: Tensor) -> float:
        """Relative error of the layer's output under another weight."""
        return float((self.inputs @ (weight - self.weight).T).norm() / (self.inputs @ self.weight.T).norm())


class Bench:
    """A dense model, and its weights replaced by one method after another."""

    def __init__(self, model: Any, name: str, task: Task, out: Path) -> None:
        self.model, self.name, self.task, self.out = model.eval(), name, task, out
        modules = layers_to_convert(model, SVDQConfig())
        inputs = inputs_of(model, modules, task.sample())
        self.layers = {
            name: Layer(module, dense_weight(module), inputs[name]) for name, module in modules.items()
        }
        self.reference: dict[str, Any] = {}
        self.seen: dict[str, InputStatistics] = {}
        self.calibrating = 0.0

    @torch.no_grad()
    def run(self, methods: Sequence[str], again: bool = False) -> None:
        """Run the methods that have no cell yet, or all; says of each one what it gave or why not."""
        done = {cell["method"]: cell for cell in read(self.out) if self._is_mine(cell)}
        todo = [method for method in methods if again or method not in done]
        if not todo:
            return
        self.reference = self.task(self.model)
        if FP32 not in done:
            self._write({"method": FP32, "bits": 32.0, **self.reference, "change": 0.0, "kl": 0.0})
        for method in todo:
            try:
                cell = self._cell(method)
            except Exception as error:  # a peer may fail in any way; the others still run
                print(f"{method}: does not run here: {type(error).__name__}: {error}", flush=True)
                continue
            self._write(cell)

    def _is_mine(self, cell: dict[str, Any]) -> bool:
        return (cell["model"], cell["text"]) == (self.name, self.task.name)

    def _cell(self, method: str) -> dict[str, Any]:
        about: dict[str, Any] = {"method": method}
        if method in OURS:
            config = OURS[method]()
            about["config"] = config.to_dict()
            found = our_layers(copy.deepcopy(self.model), config, self._batches(method))
            calibrating = 0.0
        else:
            peer = PEERS[method]
            reason = peer.missing()
            if reason is not None:
                raise ImportError(f"not installed, or broken: {reason}")
            calibrating = self._calibrate() if peer.data else 0.0
            found = self._peer_layers(peer)
        try:
            measured = self._replace(found)
            result = self.task(self.model)
        finally:
            for layer in self.layers.values():
                layer.put(layer.weight)
        measured["seconds"] += calibrating
        return {**about, **measured, **result, "change": result["loss"] - self.reference["loss"]}

    def _batches(self, method: str) -> list[Any] | None:
        return self.task.calibration() if OURS[method]().needs_batches else None

    def _calibrate(self) -> float:
        """Collect once what the layers see; the seconds that it took."""
        if not self.seen:
            started = time.perf_counter()
            modules = {name: layer.module for name, layer in self.layers.items()}
            base = getattr(self.model, "base_model", self.model)  # the head's logits are not needed
            self.seen = collect_inputs(base, modules, self.task.calibration(), gram=True)
            self.calibrating = time.perf_counter() - started
        return self.calibrating

    def _peer_layers(self, peer: Peer) -> Iterator[tuple[str, Packed]]:
        for name, layer in self.layers.items():
            yield name, peer.quantize(layer.weight.clone(), self.seen.get(name) if peer.data else None)

    def _replace(self, found: Iterator[tuple[str, Packed]]) -> dict[str, Any]:
        """Put what a method makes of each layer into the model: bits per weight, error, seconds."""
        bits, errors, seconds, started = 0, {}, 0.0, time.perf_counter()
        for name, packed in found:
            seconds += time.perf_counter() - started
            weight = packed.dequantize().detach().float()
            layer = self.layers[name]
            if weight.shape != layer.weight.shape or not torch.isfinite(weight).all():
                raise ValueError(f"{name}: what came back is {list(weight.shape)}, or has a NaN")
            bits, errors[name] = bits + packed.bits, layer.error(weight)
            layer.put(weight)
            started = time.perf_counter()
        if errors.keys() != self.layers.keys():
            raise ValueError(f"other layers were quantized: {sorted(errors.keys() ^ self.layers.keys())}")
        weights = sum(layer.weight.numel() for layer in self.layers.values())
        error = sum(errors.values()) / len(errors)
        return {"bits": bits / weights, "output_error": error, "seconds": seconds}

    def _write(self, cell: dict[str, Any]) -> None:
        line = {"model": self.name, "text": self.task.name, **cell}
        self.out.mkdir(parents=True, exist_ok=True)
        with (self.out / "quality.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{line['method']}: {line['bits']:.3f} bits, change {line['change']:+.4f}, "
              f"KL {line['kl']:.4f}", flush=True)  # fmt: skip


def our_layers(model: Any, config: SVDQConfig, batches: Iterable[Any] | None) -> Iterator[tuple[str, Packed]]:
    """The layers of a model quantized by this package, in place, as weights bit for bit the same."""
    with torch.enable_grad():
        quantize_model(model, config, batches)
    for name, layer in svdq_layers(model):
        yield name, Packed(8 * sum(part.nbytes for part in layer.parts().values()), layer.dequantize)


@torch.no_grad()
def inputs_of(model: Any, modules: dict[str, nn.Module], batches: Iterable[Any]) -> dict[str, Tensor]:
    """The first `SAMPLE` tokens `[tokens, in]` that each module sees."""
    seen: dict[str, list[Tensor]] = {name: [] for name in modules}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, arguments, name=name: seen[name].append(arguments[0].flatten(0, -2))
        )
        for name, module in modules.items()
    ]
    for batch in batches:
        getattr(model, "base_model", model)(**batch)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts)[:SAMPLE].clone() for name, parts in seen.items()}


def dense_weight(module: nn.Module) -> Tensor:
    """A copy of the weight, `[out, in]`, float32."""
    weight: Tensor = module.weight
    stored = weight.detach() if isinstance(module, nn.Linear) else weight.detach().T
    return stored.float().clone(memory_format=torch.contiguous_format)


def read(out: Path) -> list[dict[str, Any]]:
    """The cells of a folder; of those that were run again, the last."""
    file = out / "quality.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    cells = [json.loads(line) for line in lines]
    return list({(cell["model"], cell["text"], cell["method"]): cell for cell in cells}.values())


def table(cells: Iterable[dict[str, Any]]) -> str:
    """A Markdown table for each model and text, the smallest KL first."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for cell in cells:
        groups.setdefault((cell["model"], cell["text"]), []).append(cell)
    return "\n".join(_group(*about, group) for about, group in groups.items())


def _group(model: str, text: str, cells: list[dict[str, Any]]) -> str:
    by_name = {cell["method"]: cell for cell in cells}
    scores = list(cells[0]["metrics"])
    titles = ["method", "bits", "change of loss", "95 %", f"x {BASELINE}", "KL", f"x {BASELINE}", *scores,
              "output error", "seconds"]  # fmt: skip
    lines = [f"| {' | '.join(titles)} |", "|" + " --- |" * len(titles)]
    for cell in sorted(cells, key=lambda cell: cell["kl"]):
        entries = [cell["method"], number(cell["bits"], 3)]
        entries += [change(cell["change"]), _interval(cell), _times(cell, by_name, "change")]
        entries += [small(cell["kl"]), _times(cell, by_name, "kl")]
        entries += [number(cell["metrics"][score]) for score in scores]
        entries += [number(cell.get("output_error")), number(cell.get("seconds"), 1)]
        lines.append(f"| {' | '.join(entries)} |")
    dense = by_name[FP32]
    title = f"### {model}: {text} (n = {dense['n']}, FP32 loss {dense['loss']:.4f})"
    return "\n".join([title, "", *lines, ""])


def _interval(cell: dict[str, Any]) -> str:
    return " to ".join(map(change, cell["interval"])) if cell.get("interval") else "-"


def _times(cell: dict[str, Any], by_name: dict[str, dict[str, Any]], key: str) -> str:
    base = by_name.get(BASELINE, {}).get(key, 0.0)
    return number(cell[key] / base if base > 0 else None, 2)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, and print the tables of all that is there."""
    methods = [*PEERS, *OURS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", type=Path, help="a folder: a causal model; with --task a classifier; "
                        "with --speech a Whisper")  # fmt: skip
    parser.add_argument("--text", type=Path, help="a plain text, or .jsonl with the key text")
    parser.add_argument("--speech", type=Path, help="a text to be read aloud, as --text")
    parser.add_argument("--task", help="a GLUE task")
    parser.add_argument("--data", help="a folder with the task's data; left out: the Hub")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of the text to score")
    parser.add_argument("--calibration", type=int, default=8192, help="tokens for the methods that need data")
    parser.add_argument("--method", nargs="+", choices=methods, default=methods, metavar="NAME",
                        help="all, or some of: " + ", ".join(methods))  # fmt: skip
    parser.add_argument("--again", action="store_true", help="run finished cells again; the last one counts")
    parser.add_argument("--table", action="store_true", help="only print the tables")
    chosen = parser.parse_args(arguments)
    if not chosen.table:
        if chosen.model is None or [chosen.text, chosen.speech, chosen.task].count(None) != 2:
            parser.error("give --model and one of --text, --speech and --task; or --table")
        if chosen.task and task_of(chosen.task).labels == 1:
            parser.error(f"{chosen.task} is a regression: it has no KL to compare")
        bench(chosen).run(chosen.method, chosen.again)
    print(table(read(chosen.out)))


def bench(chosen: argparse.Namespace) -> Bench:
    """The bench that the command line asks for."""
    tokenizer = AutoTokenizer.from_pretrained(chosen.model)
    task: Task
    if chosen.task is not None:
        model = classifier(chosen.model, chosen.task)
        task = GlueTask(chosen.task, tokenizer, chosen.data, chosen.calibration)
    elif chosen.speech is not None:
        model = AutoModelForSpeechSeq2Seq.from_pretrained(chosen.model, dtype=torch.float32)
        listen = AutoFeatureExtractor.from_pretrained(chosen.model)
        task = SpeechTask(chosen.speech, tokenizer, listen, chosen.tokens, chosen.calibration)
    else:
        model = AutoModelForCausalLM.from_pretrained(chosen.model, dtype=torch.float32)
        task = TextTask(chosen.text, tokenizer, chosen.context, chosen.tokens, chosen.calibration)
    return Bench(model, chosen.model.resolve().name, task, chosen.out)


if __name__ == "__main__":
    logging.disable_progress_bar()
    main()
