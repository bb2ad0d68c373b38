"""Fine-tune a quantized classifier on a GLUE task, one way a process: score, loss, memory, seconds per step.

    python examples/finetune_quantized.py run rte FOLDER OUT.jsonl --base 4bit --way salient
    python examples/finetune_quantized.py table OUT.jsonl

FOLDER is a dense sequence classifier: one that examples/finetune_glue.py fine-tuned, to see how much of
what quantizing lost comes back, or "new" for MiniLM with a new head. Every way trains and keeps its own
choice of weights: full (the dense model, all of it), salient, LoRA, and LoRA that starts from the error of
quantizing. Peak memory is what the process holds above what it held before the model was loaded, scoring
left out. KL is that of the answers from the FOLDER's own, on the dev set.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch
from finetune_glue import minilm_as_distilbert
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.utils import logging

from svdq_hf import SVDQConfig
from svdq_hf.demo import default_model
from svdq_hf.evaluation.tasks.classification import Score, score_model
from svdq_hf.evaluation.tasks.glue import load_split, tokenize
from svdq_hf.evaluation.tasks.glue_tasks import TASKS, task_of
from svdq_hf.training.salient import mark_trainable

HEAD = ["pre_classifier", "classifier"]
BASES = {
    "fp32": lambda: None,
    "4bit": SVDQConfig,
    "3bit": lambda: SVDQConfig(bits=3),
    "paper": SVDQConfig.paper,
    "nf4": lambda: BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=HEAD
    ),
}
LEARNING_RATES = {"none": 0.0, "full": 5e-5, "salient": 2e-3, "lora": 5e-4, "lora-error": 5e-4}


def with_adapters(model, folder: str, *, from_error: bool):
    """LoRA of rank 8 on every quantized layer, and the head trained as it is."""
    from peft import LoraConfig, TaskType, get_peft_model

    layers = ["q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"]
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS, r=8, lora_alpha=16, target_modules=layers, modules_to_save=HEAD
    )
    model = get_peft_model(model, config)
    if from_error:
        from svdq_hf.integrations.peft.adapters import init_adapters_from_error

        init_adapters_from_error(model, folder)
    return model


def prepared(folder: str, base: str, way: str):
    """The model of a base, ready for a way to train it."""
    load = AutoModelForSequenceClassification.from_pretrained
    model = load(folder, quantization_config=BASES[base]()) if base != "fp32" else load(folder)
    if way.startswith("lora") or base == "nf4":  # Trainer scores no bitsandbytes model without adapters
        return with_adapters(model, folder, from_error=way == "lora-error")
    if way == "salient":
        mark_trainable(model, show=False)
    return model


def memory(field: str) -> float:
    """A number of megabytes from /proc/self/status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if field in line)
    return int(line.split()[1]) / 1024


class Clock(TrainerCallback):
    """Seconds of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args, **kwargs) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, *args, **kwargs) -> None:
        self.seconds.append(time.perf_counter() - self.start)


def train(model, encoded, tokenizer, options) -> Clock:
    """Plain Trainer: linear decay after a tenth of warm-up, batches of 16 of like length."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, seed=options.seed, num_train_epochs=options.epochs, max_steps=options.steps or -1,
            learning_rate=options.learning_rate or LEARNING_RATES[options.way], warmup_steps=0.1,
            per_device_train_batch_size=16, train_sampling_strategy="group_by_length",
            bf16=options.bf16, gradient_checkpointing=options.checkpointing, label_names=["labels"],
            report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
            dataloader_pin_memory=False,
        )  # fmt: skip
        collate = DataCollatorWithPadding(tokenizer)
        train_set = encoded.remove_columns(["position"])
        trainer = Trainer(model, arguments, collate, train_dataset=train_set, callbacks=[clock])
        trainer.train()
    return clock


def reference(options, dev, tokenizer, near: Path) -> Score:
    """The dense model's answers, kept beside the results."""
    kept = near.with_name(f"{Path(options.folder).name}-{options.task}.logits.json")
    if not kept.exists():
        model = AutoModelForSequenceClassification.from_pretrained(options.folder)
        kept.write_text(json.dumps(score_model(model, dev, tokenizer).logits.tolist()))
    return Score(torch.tensor(json.loads(kept.read_text())), torch.tensor(sorted_labels(dev)))


def sorted_labels(dev) -> list[int]:
    return [label for _, label in sorted(zip(dev["position"], dev["label"], strict=True))]


def run(options) -> None:
    """Train one way and add a line of results to OUT."""
    if options.base == "nf4" and options.way in ("salient", "full"):
        raise SystemExit(f"--base nf4 --way {options.way}: bitsandbytes' weights do not train; take lora")
    out, new = Path(options.out), options.folder == "new"
    torch.manual_seed(options.seed)
    tokenizer = AutoTokenizer.from_pretrained(default_model())
    encoded, dev = (
        tokenize(options.task, load_split(options.task, split, options.data), tokenizer)
        for split in ("train", "dev")
    )
    with tempfile.TemporaryDirectory() as folder:
        if new:
            minilm_as_distilbert(task_of(options.task).labels).save_pretrained(folder)
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        before = memory("VmRSS")
        model = prepared(folder if new else options.folder, options.base, options.way)
        trains = options.way != "none" and options.epochs > 0
        clock = train(model, encoded, tokenizer, options) if trains else Clock()
        peak = memory("VmHWM") - before
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    line = {**vars(options), "peak_mb": round(peak), "trainable": trainable}
    if clock.seconds:
        line["seconds"] = round(statistics.median(clock.seconds), 3)
    if not options.steps:
        found = score_model(model.eval(), dev, tokenizer)
        line |= {**found.metrics(options.task), "loss": found.loss}
        if not new:
            line["kl"] = float(found.divergence(reference(options, dev, tokenizer, out)).mean())
    with out.open("a") as file:
        file.write(json.dumps(line) + "\n")
    print(line)


def table(options) -> None:
    """Means over seeds, as Markdown; time and memory from the lines of --steps where there are such."""
    cells = defaultdict(list)
    for line in map(json.loads, Path(options.out).read_text().splitlines()):
        kind = "fine-tuned" if line["folder"] != "new" else "new head"
        cells[line["task"], kind, line["base"], line["way"], line["bf16"], line["checkpointing"]].append(line)
    print("| task | start | base | trained | seeds | accuracy | loss | KL | peak MB | s/step | trainable |")
    print("|---" * 11 + "|")
    for (task, kind, base, way, bf16, checkpointing), lines in cells.items():
        scored = [line for line in lines if "loss" in line]
        quick = [line for line in lines if line["steps"]] or lines

        def mean(key: str, of: list, form: str) -> str:
            values = [line[key] for line in of if key in line]
            return format(statistics.mean(values), form) if values else ""

        name = way + (", bf16" if bf16 else "") + (", checkpointing" if checkpointing else "")
        row = [task, kind, base, name, str(len(scored)), mean("accuracy", scored, ".3f")]
        row += [mean("loss", scored, ".3f"), mean("kl", scored, ".4f"), mean("peak_mb", quick, ".0f")]
        print(
            "| " + " | ".join([*row, mean("seconds", quick, ".2f"), mean("trainable", lines, ".0f")]) + " |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("run")
    one.set_defaults(call=run)
    one.add_argument("task", choices=sorted(TASKS))
    one.add_argument("folder")
    one.add_argument("out")
    one.add_argument("--base", choices=BASES, default="4bit")
    one.add_argument("--way", choices=LEARNING_RATES, default="salient")
    one.add_argument("--data", help="folder with TASK/train.jsonl and TASK/dev.jsonl; else the Hub")
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--epochs", type=float, default=1, help="0: only start, score")
    one.add_argument("--learning-rate", type=float)
    one.add_argument("--steps", type=int, help="so many only, for memory and time, and no score")
    one.add_argument("--bf16", action="store_true")
    one.add_argument("--checkpointing", action="store_true")
    show = commands.add_parser("table")
    show.set_defaults(call=table)
    show.add_argument("out")
    options = parser.parse_args()
    logging.disable_progress_bar()
    call = options.__dict__.pop("call")
    call(options)


if __name__ == "__main__":
    main()
