"""`svdq evaluate`: measures what quantizing costs, on GLUE or in perplexity, and writes a report.

Not here: the run (`evaluation.run`), and its request from Python (`evaluation.request`).
"""

import argparse
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Final

from svdq_hf.cli.options import check_there, examples, several
from svdq_hf.core.release import how_to_install
from svdq_hf.evaluation.sweep.defaults import GRID_NAMES, KS, METHODS, PERPLEXITY, RANKS, SEEDS
from svdq_hf.evaluation.tasks.glue_tasks import TASKS

EXAMPLE: Final = "svdq evaluate --task rte --model rte-seed0 rte-seed1 --data glue --k 64 1024 --out report"

if TYPE_CHECKING:
    from svdq_hf.evaluation import EvaluationRequest


def add(commands: Any) -> argparse.ArgumentParser:
    """Add the command's parser to those of `svdq`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "evaluate",
        help="what quantizing costs: GLUE or perplexity, a report",
        **examples(EXAMPLE),
    )
    add = parser.add_argument
    tasks = (*TASKS, PERPLEXITY)
    add("--task", required=True, choices=tasks, metavar="TASK", help=f"one of {', '.join(tasks)}")
    add("--model", required=True, nargs="+", help="dense models to quantize and evaluate, e.g. one per seed")
    add("--out", required=True, help="folder of the cells and the report; a run that stopped goes on there")
    add("--data", help="folder with TASK/train.jsonl and TASK/dev.jsonl (or tsv, csv, parquet) (the Hub)")
    add("--text", help="perplexity: a text file")
    add("--context", type=int, help="perplexity: tokens the model sees at once (1024), or all that it can")
    add("--tokens", type=int, default=16384, help="perplexity: tokens of the text that are scored (16384)")
    script = "a local copy of the evaluate library's metric 'glue', to compute the scores (our own code)"
    add("--metric-script", help=script)
    _add_sweep(parser)
    return parser


def _add_sweep(parser: argparse.ArgumentParser) -> None:
    """Options of the choices to compare; each takes several values."""
    add = parser.add_argument_group("compared").add_argument
    add("--k", help=f"salient weights, or shares below 1 {_shown(KS)}", **several("k", KS))
    add("--saliency", help=f"scores to compare {_shown(METHODS)}", **several("saliency", METHODS))
    grids = "of scales: that of SVDQConfig(), group (64 columns, linear) or tensor (one scale, the paper's)"
    add("--grid", nargs="+", choices=GRID_NAMES, default=["default"], help=f"{grids} (default)")
    add("--bits", help="of codes, on each grid (4)", **several("bits", [4]))
    add("--rank", help="ranks of the svd score (8)", **several("rank", RANKS))
    add("--seeds", type=int, default=SEEDS, help="seeds of the random choice (3)")


def request_of(options: argparse.Namespace) -> "EvaluationRequest":
    """The request that the options express: its fields have their names."""
    from svdq_hf.evaluation import EvaluationRequest

    return EvaluationRequest(**{one.name: getattr(options, one.name) for one in fields(EvaluationRequest)})


def _shown(values: Sequence[object]) -> str:
    return f"({' '.join(map(str, values))})"


def run(options: argparse.Namespace) -> dict[str, object]:
    """Run the cells that are not computed yet and write the report.

    Args:
        options: the parsed command line.

    Returns:
        The result, as `--json` prints it.

    Raises:
        ImportError: the extra `evaluate` is not installed.
    """
    for model in options.model:
        check_there(model)
    from svdq_hf.cli.tables import console

    try:
        from svdq_hf.evaluation import evaluate

        result = evaluate(request_of(options))
    except ModuleNotFoundError as error:
        text = " ".join(str(error).split())
        more = f"evaluating needs more packages: {how_to_install('evaluate')}"
        raise ImportError(f"{text}; {more}") from error
    if not options.json:
        console().print(f"{result.cells} cells in {result.seconds:.0f} s; read {options.out}/report.html")
    return result.to_dict()
