"""Cell of a sweep: one model evaluated once, a line of OUT/cells.jsonl; also of a folder quantized already.

Not here: which cells there are (`evaluation.sweep.plan`), quantizing for them (`evaluation.sweep.run`),
reading them (`evaluation.report.read`).
"""

import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from svdq_hf.config import SVDQConfig
from svdq_hf.config.choices import CHOICES
from svdq_hf.evaluation.sweep.defaults import STORED
from svdq_hf.evaluation.sweep.plan import Key
from svdq_hf.evaluation.sweep.store import CELLS, append, finished
from svdq_hf.quantize.footprint import footprint


class Evaluator(Protocol):
    """Evaluates a model on a task; the first model it gets is the FP32 reference for the others."""

    task: str

    def __call__(self, model: Any) -> dict[str, Any]:
        """The results of a cell: n, right, correct, majority, metrics, loss, kl and kl_each."""

    def calibration(self) -> Iterable[Any]:
        """Batches for the scores that need data."""


def measured(model: Any, evaluate: Evaluator) -> tuple[dict[str, Any], dict[str, float]]:
    """The results of a quantized model, with its bits per weight, and the relative error of each layer.

    Args:
        model: the model.
        evaluate: evaluates it on the task.
    """
    sizes = footprint(model)
    errors = {
        layer.name: layer.facts["relative_error"] for layer in sizes.layers if "relative_error" in layer.facts
    }
    return {**evaluate(model), "bits_per_weight": sizes.bits_per_weight}, errors


def write_cell(out: Path, key: Key, found: dict[str, Any]) -> None:
    """Append a cell to those of a folder.

    Args:
        out: the folder.
        key: of the cell.
        found: task, model, and what was measured.
    """
    line = {
        "model_seed": model_seed(found["model"]), "method": key.method, "grid": key.grid, "k": key.k,
        "rank": key.rank, "score_seed": key.seed, **found,
    }  # fmt: skip
    append(out / CELLS, [line])


def run_stored(model: Any, name: str, evaluate: Evaluator, out: Path) -> int:
    """Evaluate a model that is quantized already, as it is: one cell, its config in place of a grid's name.

    Args:
        model: the model.
        name: of the model, in the cell.
        evaluate: evaluates it on the task.
        out: folder of the cells.

    Returns:
        1, or 0 where the cell is there.
    """
    config = model.config.quantization_config
    key = Key(STORED, f"{STORED}: {told(config)}", config.k, 0, None)
    if key in finished(out, evaluate.task, name):
        return 0
    out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    result, errors = measured(model, evaluate)
    result = {**result, "kl": None, "kl_each": None}  # there is no dense model to compare with
    seconds = {"quantize": 0.0, "evaluate": time.perf_counter() - started}
    about = {"task": evaluate.task, "model": name, "relative_error": errors or None, "seconds": seconds}
    write_cell(out, key, {**about, **result})
    return 1


def told(config: SVDQConfig) -> str:
    """A config in a line: bits and score, and whatever is not the default.

    >>> told(SVDQConfig.small(lm_head=True))
    'bits=4, saliency=relative, k=0.0009, group_size=64, lm_head=True'
    """
    plain = SVDQConfig(bits=config.bits)
    names = [name for name, row in CHOICES.items() if row.stored and name not in (*_ALWAYS, "layer_k")]
    others = [name for name in names if getattr(config, name) != getattr(plain, name)]
    return ", ".join(f"{name}={getattr(config, name)}" for name in (*_ALWAYS, *others))


_ALWAYS = ("bits", "saliency", "k")


def model_seed(name: str) -> int | None:
    """The fine-tuning seed at the end of a model's name; None where there is none.

    >>> model_seed("minilm-rte-seed2"), model_seed("minilm")
    (2, None)
    """
    found = re.search(r"seed(\d+)$", name)
    return int(found[1]) if found else None
