"""Where the time of a grid of cells goes: `svdq evaluate`'s work, with a clock at each of its parts.

    python examples/bench_grid.py OUT --task rte --data DIR --model MODEL [MODEL ...]   # on a quiet machine

The grid is the one of examples/results: six k's, six scores, three seeds of the random choice, the grid
of groups and the paper's. "Rest" is what is neither the model's forward pass nor quantizing (scoring is
part of quantizing): data, batches, metrics, files. A cell that is finished in OUT is not run again.
"""

import argparse
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import disable_progress_bars
from torch import Tensor, nn

from svdq_hf.evaluation.sweep.defaults import GRID_NAMES, KS, METHODS
from svdq_hf.evaluation.sweep.plan import Key, SweepPlan
from svdq_hf.evaluation.sweep.run import Sweep
from svdq_hf.evaluation.tasks.classification import GlueEvaluator, classifier


class TimedRun(Sweep):
    """A run that knows its seconds: `seconds["forward"]`, `seconds["quantize"]`, `seconds["all"]`."""

    def run(self) -> int:
        self.seconds: Counter[str] = Counter()
        starts: list[float] = []
        before = self.model.register_forward_pre_hook(lambda *_: starts.append(time.perf_counter()))
        after = self.model.register_forward_hook(lambda *_: self._add("forward", starts.pop()))
        cells = self._timed("all", super().run)
        before.remove()
        after.remove()
        return cells

    def _scores(self, key: Key) -> dict[str, Tensor]:
        forward = self.seconds["forward"]  # calibration runs the model: not counted twice
        scores = self._timed("quantize", super()._scores, key)
        self.seconds["quantize"] -= self.seconds["forward"] - forward
        return scores

    def _quantized(self, *args: Any) -> tuple[nn.Module, float]:
        return self._timed("quantize", super()._quantized, *args)

    def _timed(self, what: str, do: Callable[..., Any], *args: Any) -> Any:
        started = time.perf_counter()
        result = do(*args)
        self._add(what, started)
        return result

    def _add(self, what: str, started: float) -> None:
        self.seconds[what] += time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--task", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", nargs="+", type=Path, required=True)
    options = parser.parse_args()
    disable_progress_bars()
    grids = [GRID_NAMES[grid] for grid in ("group", "tensor")]
    plan = SweepPlan(ks=KS, methods=METHODS, grids=grids, seeds=3, ranks=[8])
    total: Counter[str] = Counter()
    cells = 0
    for folder in options.model:
        run = _run(options, folder, plan)
        cells += run.run()
        total += run.seconds
    rest = 1 - (total["forward"] + total["quantize"]) / total["all"]
    print(f"{options.task}: {cells} cells in {total['all'] / 60:.1f} min: forward {total['forward']:.0f} s, "
          f"quantizing {total['quantize']:.0f} s, rest {rest:.1%}")  # fmt: skip


def _run(options: argparse.Namespace, folder: Path, plan: SweepPlan) -> TimedRun:
    from transformers import AutoTokenizer

    model = classifier(folder, options.task)
    evaluator = GlueEvaluator(options.task, AutoTokenizer.from_pretrained(folder), options.data)
    return TimedRun(model, folder.name, evaluator, plan, options.out)


if __name__ == "__main__":
    main()
