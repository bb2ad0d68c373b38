"""Cells with known answers, for the tests of the report; and a folder as large as a real grid."""

import json
import math
import random
from pathlib import Path
from typing import Any

KS = (1, 16, 64, 256, 1024, 4096)
METHODS = {"svd": 0.55, "magnitude": 0.45, "relative": 0.4, "awq": 0.35, "spqr": 0.3, "random": 0.98}
PARTS = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")
LAYERS = [
    f"encoder.layer.{number}.{part}"
    for number in range(6)
    for part in (*PARTS, "intermediate.dense", "output.dense")
]


def cell(method: str = "fp32", k: float = 0, **changes: Any) -> dict[str, Any]:
    """A cell of ten examples, as `svdq evaluate` writes it; `correct` decides what is right."""
    correct = changes.pop("correct", "1111100000")
    right = None if correct is None else correct.count("1")
    dense = method == "fp32"
    base = {
        "task": "rte",
        "model": f"mini-seed{changes.get('model_seed', 0)}",
        "model_seed": 0,
        "method": method,
        "grid": None if dense else "group 64, mse",
        "k": k,
        "rank": 8 if method == "svd" else None,
        "score_seed": 0,
        "n": 10 if correct is None else len(correct),
        "right": right,
        "correct": correct,
        "metrics": {"accuracy": right / len(correct)} if correct else {"pearson": 0.9},
        "loss": 0.5,
        "kl": None if dense else 0.01,
        "kl_each": None,
        "majority": None,
        "bits_per_weight": 32 if dense else 4.25,
        "relative_error": None,
        "seconds": {"quantize": 1.0, "evaluate": 2.0},
    }
    return {**base, **changes}


def overlap(layer: str = "a.0", k: float = 256, other: str = "spqr", **changes: Any) -> dict[str, Any]:
    base = {"task": "rte", "model": "mini-seed0", "layer": layer, "k": k, "rank": 8, "other": other}
    return {**base, "iou": 0.4, "share": 0.57, "chance": 0.002, **changes}


def write(folder: Path, cells: list[dict[str, Any]], overlaps: list[dict[str, Any]] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    files = {"cells.jsonl": cells, "overlap.jsonl": overlaps}
    for name, lines in files.items():
        if lines is not None:
            (folder / name).write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return folder


def realistic(folder: Path) -> Path:
    """Six ks, six methods, three models of 277 examples, 36 layers: drawn from a fixed seed."""
    draw = random.Random(0)
    cells = [one for seed in range(3) for one in _of_model(seed, draw)]
    overlaps = [
        overlap(layer, k, other, **_alike(k, draw))
        for layer in LAYERS
        for k in KS
        for other in ("spqr", "awq", "magnitude")
    ]
    return write(folder, cells, overlaps)


def _of_model(seed: int, draw: random.Random) -> list[dict[str, Any]]:
    dense = "".join("1" if draw.random() < 0.66 else "0" for _ in range(277))
    yields = [cell("fp32", model_seed=seed, correct=dense, loss=0.62)]
    yields.append(_noisy("none", 0, seed, dense, 1.0, 0, draw))
    for method, best in METHODS.items():
        for k in KS:
            left = best ** (math.log(k + 1) / math.log(4097))
            draws = range(3) if method == "random" else range(1)
            yields += [_noisy(method, k, seed, dense, left, one, draw) for one in draws]
    return yields


def _noisy(
    method: str, k: int, seed: int, dense: str, left: float, score_seed: int, draw: random.Random
) -> dict[str, Any]:
    correct = "".join(bit if draw.random() > 0.12 * left else str(int(draw.random() < 0.45)) for bit in dense)
    return cell(
        method,
        k,
        model_seed=seed,
        score_seed=score_seed,
        correct=correct,
        loss=0.62 + 0.03 * left + 0.004 * draw.random(),
        kl=0.03 * left**3 * (0.9 + 0.2 * draw.random()),
        bits_per_weight=4.25 + 96 * k / (384 * 600),
        relative_error={layer: 0.09 * left * (0.8 + 0.4 * draw.random()) for layer in LAYERS},
    )


def _alike(k: int, draw: random.Random) -> dict[str, float]:
    share = min(0.95, max(0.02, 0.2 + 0.13 * math.log10(k + 1) + 0.12 * draw.gauss(0, 1)))
    return {"share": share, "iou": share / (2 - share), "chance": k / (384 * 600)}
