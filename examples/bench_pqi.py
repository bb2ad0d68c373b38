"""PQI beside the true change of the loss, and what the weights are worth that it and ReQuant choose.

    python examples/bench_pqi.py OUT sum --model FOLDER --text FILE --samples 1
    python examples/bench_pqi.py OUT choice --model FOLDER --text FILE --held OTHER [--method NAME ...]
    python examples/bench_pqi.py OUT cost --model FOLDER --text FILE
    python examples/bench_pqi.py OUT table

`sum`: the slope of the loss along the line from dense to rounded weights, at 65 places, from which every rule
of 8 and 32 steps is made; the loss at both ends is that of the same batches. `choice`: weights are chosen on
FILE, and the loss is taken on OTHER (`--scored` windows of it). `cost`: time and memory of PQI. Each cell is
one JSON line of OUT/pqi.jsonl; finished ones are not run again, so a run that was killed goes on.
"""

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from svdq_hf import SVDQConfig, footprint, quantize_model, sensitivity
from svdq_hf.calibration.pqi import Line, model_loss, places, walk
from svdq_hf.calibration.texts import text_batches
from svdq_hf.core.saliency import Scored
from svdq_hf.evaluation.speed.memory import memory_now, watched
from svdq_hf.quantize.budget import affordable, by_loss, items_of
from svdq_hf.quantize.layer import matrix_of, quantized_layer
from svdq_hf.quantize.rounding_lines import lines_of
from svdq_hf.quantize.selection import layers_to_convert

STEPS = 32
SHARE = 0.005
GRIDS: dict[str, Callable[[], SVDQConfig]] = {"default": SVDQConfig, "paper()": SVDQConfig.paper}
METHODS: dict[str, Callable[[], SVDQConfig]] = {
    "nothing salient": lambda: SVDQConfig(k=0),
    "0.5 % at random": lambda: SVDQConfig(k=SHARE, saliency="random"),
    "0.5 % by awq": lambda: SVDQConfig(k=SHARE, saliency="awq"),
    "0.5 % by relative": lambda: SVDQConfig(k=SHARE, saliency="relative"),
    "0.5 % by PQI": lambda: SVDQConfig(k=SHARE, saliency="pqi"),
    "0.5 % by ReQuant": lambda: SVDQConfig(k=SHARE, saliency="requant"),
    "best()": SVDQConfig.best,
    "best(), PQI": lambda: SVDQConfig.best(saliency="pqi"),
    "best(), ReQuant": lambda: SVDQConfig.best(saliency="requant"),
    "calibrated()": SVDQConfig.calibrated,
    "calibrated(), ReQuant": lambda: SVDQConfig.calibrated(saliency="requant"),
    "paper(): nothing salient": lambda: SVDQConfig.paper(k=0),
    "paper(): 0.5 % at random": lambda: SVDQConfig.paper(k=SHARE, saliency="random"),
    "paper(): 0.5 % by PQI": lambda: SVDQConfig.paper(k=SHARE, saliency="pqi"),
    "paper(): 0.5 % by ReQuant": lambda: SVDQConfig.paper(k=SHARE, saliency="requant"),
}
"""Ways to choose, by name; a new one is a line here."""
DENSE, SIGNED = "dense", "best(), PQI by sign"

Row = dict[str, Any]


class Cells:
    """The rows of OUT/pqi.jsonl: which cells there are, and one more."""

    def __init__(self, out: Path) -> None:
        self.file = out / "pqi.jsonl"
        out.mkdir(parents=True, exist_ok=True)
        lines = self.file.read_text().splitlines() if self.file.is_file() else []
        self.rows: list[Row] = [json.loads(line) for line in lines]

    def has(self, **key: Any) -> bool:
        """Whether there is a row of these values."""
        return any(self.matches(row, key) for row in self.rows)

    def of(self, **key: Any) -> list[Row]:
        """The rows of these values."""
        return [row for row in self.rows if self.matches(row, key)]

    @staticmethod
    def matches(row: Row, key: Row) -> bool:
        """Whether a row has these values."""
        return all(row.get(name) == value for name, value in key.items())

    def add(self, row: Row) -> None:
        """Write a row, and say it."""
        self.rows.append(row)
        with self.file.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print({name: value for name, value in row.items() if name != "losses"}, flush=True)


def loaded(folder: str) -> Any:
    """The dense model in FP32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)


def windows(file: str, options: argparse.Namespace, model: Any, samples: int) -> list[Any]:
    """Batches of a text."""
    return text_batches(file, options.model, model, samples=samples, length=options.length)


def sums(cells: Cells, options: argparse.Namespace) -> None:
    """The slope at every place of each grid."""
    model = loaded(options.model)
    batches = windows(options.text, options, model, options.samples)
    for grid in options.grid or GRIDS:
        config = GRIDS[grid]()
        key = {"part": "sum", "model": Path(options.model).name, "grid": grid}
        left = [place for place in all_places() if not cells.has(**key, place=place)]
        lines = lines_of(layers_to_convert(model, config), config) if left else {}
        for place in left:
            tokens = sum(batch["input_ids"].numel() for batch in batches)
            cells.add(key | {"tokens": tokens, "place": place} | slope_at(model, lines, batches, place))


def all_places() -> list[float]:
    """The places of midpoint and one-sided sums of 8 and 32 steps."""
    wanted = [0.0, 1.0, *places(8), *places(STEPS), *places(8, "left"), *places(STEPS, "left")]
    return list(dict.fromkeys(wanted))


def slope_at(model: Any, lines: dict[str, Line], batches: Sequence[Any], place: float) -> Row:
    """The loss at a place of the line, and its derivative there: the sum of gradient times difference."""
    found = [0.0]

    def take(name: str, gradient: torch.Tensor, at: float) -> None:
        found[0] += float((gradient * lines[name].difference()).sum(dtype=torch.float64))

    started = time.process_time()
    losses = [loss for _, loss in walk(model, lines, batches, [place], take)]
    seconds = time.process_time() - started
    return {"loss": sum(losses) / len(losses), "slope": found[0], "cpu_seconds": round(seconds, 1)}


def choice(cells: Cells, options: argparse.Namespace) -> None:
    """The loss on another text, of each way to choose."""
    dense = loaded(options.model)
    given = windows(options.text, options, dense, options.samples)
    held = windows(options.held, options, dense, options.scored)
    sizes = {"samples": options.samples, "length": options.length, "scored": options.scored}
    key = {"part": "choice", "model": Path(options.model).name, **sizes}
    for method in [DENSE, *(options.method or METHODS)]:
        if cells.has(**key, method=method):
            continue
        started, model, bits = time.process_time(), dense, 32.0
        if method == SIGNED:
            model = quantized_by_sign(copy.deepcopy(dense), given)
            bits = footprint(model).bits_per_weight
        elif method != DENSE:
            config = METHODS[method]()
            model = quantize_model(copy.deepcopy(dense), config, given if config.data_needs else None)
            bits = footprint(model).bits_per_weight
        seconds = time.process_time() - started
        losses = list(window_losses(model, held))
        mean = sum(losses) / len(losses)
        row = {"method": method, "bits": bits, "loss": mean, "cpu_seconds": round(seconds, 1)}
        cells.add(key | row | {"losses": losses})


def quantized_by_sign(model: Any, batches: Sequence[Any]) -> Any:
    """A model that keeps the weights of which PQI says that rounding costs the loss, as many as `best()`."""
    config = SVDQConfig.best()
    terms = sensitivity(model, batches, config, steps=1).terms
    layers = layers_to_convert(model, config)
    config = config.replace(layer_k=by_loss(terms, affordable(items_of(layers), config)))
    for name, module in layers.items():
        model.set_submodule(name, quantized_layer(name, module, config, scored=Scored(terms[name], {})))
    return model


@torch.no_grad()
def window_losses(model: Any, batches: Sequence[Any]) -> Iterator[float]:
    """The loss of each window."""
    for batch in batches:
        for ids in batch["input_ids"]:
            yield float(model_loss(model.eval(), {"input_ids": ids[None]}))


def cost(cells: Cells, options: argparse.Namespace) -> None:
    """Time and memory of the PQI of all weights, above the model's."""
    model = loaded(options.model)
    layers = layers_to_convert(model, SVDQConfig())
    batches = windows(options.text, options, model, options.samples)
    before, started = memory_now(), time.process_time()
    with watched() as peak:
        sensitivity(model, batches, steps=options.steps)
    seconds, more = time.process_time() - started, peak.memory - before
    sizes_of = [matrix_of(layer).numel() for layer in layers.values()]
    sizes = {"samples": options.samples, "length": options.length, "steps": options.steps}
    cells.add(
        {"part": "cost", "model": Path(options.model).name, **sizes, "weights": sum(sizes_of)}
        | {"parameters": sum(one.numel() for one in model.parameters()), "cpu_seconds": round(seconds, 1)}
        | {"largest": max(sizes_of)}
        | {"anonymous_bytes": more.anonymous, "resident_bytes": more.resident}
    )


def table(cells: Cells) -> None:
    """Print Markdown tables of all parts."""
    named = dict.fromkeys((row["model"], row["grid"]) for row in cells.of(part="sum"))
    print("| model | grid | true change | rule | PQI's sum | off |\n|---|---|---|---|---|---|")
    for model, grid in named:
        for line in rules(cells.of(part="sum", model=model, grid=grid)):
            print(f"| {model} | {grid} | {' | '.join(line)} |")
    print(
        "\n| model | windows | method | bits | change of loss | standard error |\n|---|---|---|---|---|---|"
    )
    dense = {(row["model"], row["samples"]): row for row in cells.of(part="choice", method=DENSE)}
    for row in cells.of(part="choice"):
        mean, error = changed(row, dense[row["model"], row["samples"]])
        print(
            f"| {row['model']} | {row['samples']} | {row['method']} | {row['bits']:.2f} "
            f"| {mean:+.4f} | {error:.4f} |"
        )
    for row in cells.of(part="cost"):
        print(f"\n{json.dumps(row)}")


def rules(rows: list[Row]) -> Iterator[tuple[str, str, str, str]]:
    """True change, rule, sum and error of each rule whose places are all there."""
    slope = {row["place"]: row["slope"] for row in rows}
    ends = {row["place"]: row["loss"] for row in rows if row["place"] in (0.0, 1.0)}
    if len(ends) < 2:
        return
    change = ends[1.0] - ends[0.0]
    for rule, steps in (("midpoint", 8), ("midpoint", 32), ("left", 8), ("left", 32), ("left", 1)):
        at = places(steps, rule)
        if all(place in slope for place in at):
            total = sum(slope[place] for place in at) / steps
            name = "Taylor" if steps == 1 else f"{rule}, {steps}"
            yield f"{change:+.4f}", name, f"{total:+.4f}", f"{(total - change) / change:+.1%}"


def changed(row: Row, dense: Row) -> tuple[float, float]:
    """Mean change of the loss over the windows, and its standard error."""
    pairs = zip(row["losses"], dense["losses"], strict=True)
    found = torch.tensor([mine - theirs for mine, theirs in pairs], dtype=torch.float64)
    return float(found.mean()), float(found.std() / len(found) ** 0.5)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("part", choices=["sum", "choice", "cost", "table"])
    for name in ("model", "text", "held"):
        parser.add_argument(f"--{name}")
    for name, value in (("samples", 16), ("length", 256), ("scored", 16), ("steps", 8)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--grid", nargs="+", choices=list(GRIDS))
    parser.add_argument("--method", nargs="+", choices=[*METHODS, SIGNED])
    return parser.parse_args()


def main() -> None:
    """Run what is asked for."""
    options = arguments()
    logging.disable_progress_bar()
    cells = Cells(options.out)
    if options.part == "table":
        table(cells)
    else:
        {"sum": sums, "choice": choice, "cost": cost}[options.part](cells, options)


if __name__ == "__main__":
    main()
