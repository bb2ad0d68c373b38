"""The command `svdq evaluate`: its options."""

import argparse
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Final

from svdq_hf.evaluation.sweep.plan import GRID_NAMES, KS, METHODS

if TYPE_CHECKING:
    from svdq_hf.evaluation import EvaluationRequest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `svdq evaluate`."""
    add = parser.add_argument
    add("--task", required=True, help="cola, mnli, mrpc, qnli, qqp, rte, sst2, stsb, or perplexity")
    add("--model", required=True, nargs="+", help="dense models to quantize and evaluate, e.g. one per seed")
    add("--out", required=True, help="folder of the cells and the report; a run that stopped goes on there")
    add("--data", help="folder with TASK/train.jsonl and TASK/dev.jsonl (or tsv, csv, parquet) (the Hub)")
    add("--text", help="perplexity: a text file")
    add("--context", type=int, help="perplexity: tokens the model sees at once (1024), or all that it can")
    add("--tokens", type=int, default=16384, help="perplexity: tokens of the text that are scored (16384)")
    add("--k", nargs="+", type=number, default=KS, help=f"salient weights, or shares below 1 {_shown(KS)}")
    add("--saliency", nargs="+", default=METHODS, help=f"scores to compare {_shown(METHODS)}")
    add("--grid", nargs="+", choices=GRID_NAMES, default=["default"], help="of scales: that of "
        "SVDQConfig(), group (64 columns, linear) or tensor (one scale, the paper's) (default)")  # fmt: skip
    add("--bits", nargs="+", type=int, choices=(4, 3, 8), default=[4], help="of codes, on each grid (4)")
    add("--rank", nargs="+", type=int, default=[8], help="ranks of the svd score (8)")
    add("--seeds", type=int, default=3, help="seeds of the random choice (3)")
    add(
        "--metric-script",
        help="a local copy of the evaluate library's metric 'glue', to compute the scores (our own code)",
    )


def request_of(options: argparse.Namespace) -> "EvaluationRequest":
    """The request that the options spell: its fields have their names."""
    from svdq_hf.evaluation import EvaluationRequest

    return EvaluationRequest(**{one.name: getattr(options, one.name) for one in fields(EvaluationRequest)})


def _shown(values: Sequence[object]) -> str:
    return f"({' '.join(map(str, values))})"


def number(text: str) -> int | float:
    """A count, or a share: what k may be."""
    return int(text) if text.lstrip("-").isdigit() else float(text)


EXAMPLE: Final = "svdq evaluate --task rte --model rte-seed0 rte-seed1 --data glue --k 64 1024 --out report"
