"""Does spectral decay (S2D) make models that quantize better? Fine-tune, quantize, score.

    python examples/spectral_decay.py run mrpc OUT.jsonl --data ../shared/data/glue
    python examples/spectral_decay.py run text OUT.jsonl --model FOLDER --text FILE --steps 60
    python examples/spectral_decay.py table OUT.jsonl

A run fine-tunes MiniLM with a new head on a GLUE task, or a causal model on the first half of a text: with
neither, with weight decay, or with spectral decay. Then it scores the model in FP32, in 4 and 3 bits of this
package, and with plain absmax rounding of weights (a scale per row) and activations (a scale per token); the
latter is simulated: rounded values, multiplied in FP32. What OUT holds already is left out, so that it can be
stopped and started again. About two minutes a run of 240 steps on one core.
"""

import argparse
import copy
import itertools
import json
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import mean, median

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.utils import logging

from svdq_hf import SpectralDecayCallback, SVDQConfig, quantize_model
from svdq_hf.demo import default_model
from svdq_hf.evaluation.spectrum import measure_spectra
from svdq_hf.evaluation.tasks.classification import score_model
from svdq_hf.evaluation.tasks.glue import load_split, tokenize
from svdq_hf.evaluation.tasks.glue_tasks import TASKS, task_of
from svdq_hf.evaluation.tasks.perplexity import causal_score, token_ids
from svdq_hf.training.decayed_layers import linear_layers

WAYS = {  # strength of spectral decay, weight decay
    "neither": (0.0, 0.0),
    "weight decay": (0.0, 0.01),
    "s2d": (5e-4, 0.0),
    "s2d x 10": (5e-3, 0.0),
}
WINDOW = 128
"""Tokens of a training window of a text."""


class Clock(TrainerCallback):
    """Process time of each step: other processes on the machine do not count."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args, **kwargs) -> None:
        self.start = time.process_time()

    def on_step_end(self, *args, **kwargs) -> None:
        self.seconds.append(time.process_time() - self.start)


class GlueTask:
    """MiniLM with a new head on a GLUE task."""

    def __init__(self, options) -> None:
        self.name, self.learning_rate = options.task, 1e-4
        self.tokenizer = AutoTokenizer.from_pretrained(default_model())
        load = AutoModelForSequenceClassification.from_pretrained
        self.model = load(default_model(), num_labels=task_of(self.name).labels)
        train, self.dev = (load_split(self.name, split, options.data) for split in ("train", "dev"))
        self.dev = self.dev.shuffle(seed=0).select(range(min(options.scored, len(self.dev))))
        train = train.shuffle(seed=0).select(range(min(options.examples, len(train))))
        self.train, self.dev = (tokenize(self.name, rows, self.tokenizer) for rows in (train, self.dev))
        self.train = self.train.remove_columns(["position"])
        self.collate = DataCollatorWithPadding(self.tokenizer)
        self.batch, self.steps = 4, options.steps or len(self.train) // 4

    def score(self, model) -> dict[str, float]:
        found = score_model(model.eval(), self.dev, self.tokenizer)
        return {"score": found.metrics(self.name)["accuracy"], "loss": found.loss}

    def batches(self):
        rows = [{k: v for k, v in row.items() if k not in ("label", "position")} for row in self.dev]
        return [dict(self.collate(rows[start : start + 16])) for start in range(0, 64, 16)]


class TextTask:
    """A causal model on the first half of a text, scored by perplexity on the second."""

    def __init__(self, options) -> None:
        self.learning_rate, self.batch, self.steps = 2e-5, 2, options.steps or 60
        self.tokenizer = AutoTokenizer.from_pretrained(options.model)
        self.model = AutoModelForCausalLM.from_pretrained(options.model)
        ids = token_ids(Path(options.text).read_text(), self.tokenizer)
        half = ids.numel() // 2
        pieces = ids[: half // WINDOW * WINDOW].view(-1, WINDOW).tolist()
        self.train = Dataset.from_dict({"input_ids": pieces, "labels": pieces})
        self.scored, self.collate = ids[half : half + options.scored], None

    def score(self, model) -> dict[str, float]:
        found = causal_score(model.eval(), self.scored, context=256, stride=128)
        return {"score": found.perplexity, "loss": found.loss}

    def batches(self):
        return [{"input_ids": self.scored[start : start + 256][None]} for start in (0, 256)]


def trained(task, options) -> tuple[Clock, dict]:
    """Fine-tune with Trainer, as a user does; returns the clock and what spectral decay saw last."""
    strength, weight_decay = WAYS[options.way]
    clock, decay = Clock(), SpectralDecayCallback(strength=strength)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, seed=options.seed, max_steps=task.steps, per_device_train_batch_size=task.batch,
            learning_rate=task.learning_rate, warmup_steps=0.1, weight_decay=weight_decay,
            report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
            dataloader_pin_memory=False, dataloader_num_workers=0,
        )  # fmt: skip
        callbacks = [clock, decay] if strength else [clock]
        Trainer(task.model, arguments, task.collate, task.train, callbacks=callbacks).train()
    task.model.eval()
    seen = {} if decay.decay is None else decay.decay.decompositions
    return clock, {"decompositions": max(seen.values(), default=0)}


def rounded(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Absmax rounding of each row `[..., n]` to a symmetric grid of so many bits."""
    scale = values.abs().amax(-1, keepdim=True).clamp(min=1e-12) / (2 ** (bits - 1) - 1)
    return (values / scale).round() * scale


def with_absmax(model, bits: int):
    """A copy whose linear layers have rounded weights and round their inputs."""
    model = copy.deepcopy(model)
    for _, layer in linear_layers(model):
        layer.module.weight.data = rounded(layer.module.weight.data, bits)
        layer.module.register_forward_pre_hook(lambda _, inputs: (rounded(inputs[0], bits), *inputs[1:]))
    return model


QUANTIZED = {
    "fp32": lambda model: model,
    "4 bits": lambda model: quantize_model(copy.deepcopy(model), SVDQConfig()),
    "3 bits": lambda model: quantize_model(copy.deepcopy(model), SVDQConfig(bits=3)),
    "W6A6": lambda model: with_absmax(model, 6),
    "W4A4": lambda model: with_absmax(model, 4),
}


def run(options) -> None:
    """Train and score each way from each seed that OUT does not hold yet."""
    for seed, way in itertools.product(options.seeds, options.ways):
        run_one(argparse.Namespace(**vars(options), seed=seed, way=way))


def run_one(options) -> None:
    """Train and score one way, and add a line of results to OUT."""
    out, key = Path(options.out), {"task": options.task, "way": options.way, "seed": options.seed}
    held = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    if any(key.items() <= line.items() for line in held):
        return
    torch.manual_seed(options.seed)
    task = (GlueTask if options.task in TASKS else TextTask)(options)
    before = [one.to_dict() for one in measure_spectra(task.model, task.batches())]
    clock, facts = trained(task, options)
    line = {
        **key,
        **facts,
        "steps": task.steps,
        "seconds": median(clock.seconds),
        "mean_seconds": mean(clock.seconds),
    }
    line["before"] = before
    line["after"] = [one.to_dict() for one in measure_spectra(task.model, task.batches())]
    line["scores"] = {name: task.score(make(task.model)) for name, make in QUANTIZED.items()}
    with out.open("a") as file:
        file.write(json.dumps(line) + "\n")
    print(key, line["scores"])


def flagged(line: dict, tau: float = 0.95) -> list[str]:
    """The layers that spectral decay flags before training."""
    return [one["name"] for one in line["before"] if one["pcdr"] and max(one["pcdr"]) >= tau]


def table(options) -> None:
    """Scores, then spectra and outliers of the layers that are flagged, as Markdown; means over seeds."""
    lines = [json.loads(line) for line in Path(options.out).read_text().splitlines()]
    cells = defaultdict(list)
    for line in lines:
        cells[line["task"], line["way"]].append(line)
    print(f"| task | way | seeds | {' | '.join(QUANTIZED)} | s/step |\n{'|---' * (4 + len(QUANTIZED))}|")
    for (task, way), found in cells.items():
        row = [f"{mean(one['scores'][kind]['score'] for one in found):.3f}" for kind in QUANTIZED]
        seconds = mean(one["mean_seconds"] for one in found)
        print(f"| {task} | {way} | {len(found)} | {' | '.join(row)} | {seconds:.3f} |")
    print(
        "\n| task | way | sigma_1 | sigma_2 | sigma_10 | PCDR_1 | outlier ratio | of inputs | kurtosis |\n"
        + "|---" * 9
        + "|"
    )
    for (task, way), found in cells.items():
        for when in ("before", "after") if way == "neither" else ("after",):
            row = [one for line in found for one in line[when] if one["name"] in flagged(line)]
            if not row:
                continue  # no layer was flagged
            figures = [mean(one["values"][at] for one in row) for at in (0, 1, 9)]
            figures += [mean(one["pcdr"][0] for one in row)]
            figures += [
                mean(one[name] for one in row) for name in ("outlier_ratio", "input_ratio", "kurtosis")
            ]
            name = way if when == "after" else "(before training)"
            print(f"| {task} | {name} | {' | '.join(f'{figure:.4g}' for figure in figures)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("run")
    one.set_defaults(call=run)
    one.add_argument("task", choices=[*sorted(TASKS), "text"])
    one.add_argument("out")
    one.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    one.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    one.add_argument("--steps", type=int, help="one epoch, or 60 of a text")
    one.add_argument("--data", help="folder with TASK/train.jsonl and TASK/dev.jsonl; else the Hub")
    one.add_argument("--examples", type=int, default=960, help="of the training set")
    one.add_argument("--model", help="text: folder of a causal model")
    one.add_argument("--text", help="text: a file")
    one.add_argument("--scored", type=int, default=4096, help="examples of the dev set, or tokens of a text")
    show = commands.add_parser("table")
    show.set_defaults(call=table)
    show.add_argument("out")
    options = parser.parse_args()
    logging.disable_progress_bar()
    call = options.__dict__.pop("call")
    call(options)


if __name__ == "__main__":
    main()
