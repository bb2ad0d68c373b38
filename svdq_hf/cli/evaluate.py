"""`svdq evaluate`: measures what quantizing costs, on GLUE or in perplexity, and writes a report.

Not here: the run (`evaluation.run`), and its request from Python (`evaluation.request`).
"""

import argparse
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Final

from svdq_hf.cli.options import add_rows, check_there, examples, given_choices, preset_word, several
from svdq_hf.config.choices import CHOICES
from svdq_hf.config.presets import PRESETS
from svdq_hf.core.release import how_to_install
from svdq_hf.evaluation.sweep.defaults import GRID_NAMES, KS, METHODS, PERPLEXITY, SEEDS
from svdq_hf.evaluation.tasks.glue_tasks import TASKS

EXAMPLE: Final = "svdq evaluate --task rte --model rte-seed0 rte-seed1 --data glue --k 64 1024 --out report"

if TYPE_CHECKING:
    from svdq_hf.evaluation import EvaluationRequest


def add(commands: Any) -> argparse.ArgumentParser:
    """Add the command's parser to those of `svdq`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "evaluate",
        help="what quantizing costs: GLUE or perplexity, a report",
        **examples(
            EXAMPLE, "svdq evaluate --task perplexity --text t.txt --model M --preset best small --out O"
        ),
    )
    add = parser.add_argument
    tasks = (*TASKS, PERPLEXITY)
    add("--task", required=True, choices=tasks, metavar="TASK", help=f"one of {', '.join(tasks)}")
    add("--model", required=True, nargs="+", help="dense models, e.g. one per seed; or quantized folders")
    add("--out", required=True, help="folder of the cells and the report; a run that stopped goes on there")
    add("--data", help="folder with TASK/train.jsonl and TASK/dev.jsonl (or tsv, csv, parquet) (the Hub)")
    add("--text", help="perplexity: a text file")
    add("--context", type=int, help="perplexity: tokens the model sees at once (1024), or all that it can")
    add("--tokens", type=int, default=16384, help="perplexity: tokens of the text that are scored (16384)")
    script = "a local copy of the evaluate library's metric 'glue', to compute the scores (our own code)"
    add("--metric-script", help=script)
    _add_sweep(parser)
    _add_contestants(parser)
    return parser


def _add_sweep(parser: argparse.ArgumentParser) -> None:
    """Options of the choices to compare; each takes several values."""
    add = parser.add_argument_group(
        "scores that are compared", "left out where only --preset is given"
    ).add_argument
    add("--k", help=f"salient weights, or shares below 1 {_shown(KS)}", **several("k"))
    scores = f"scores to compare {_shown(METHODS)}; a preset with another score: svdq compare"
    add("--saliency", help=scores, **several("saliency"))
    grids = "of scales: that of SVDQConfig(), group (64 columns, linear) or tensor (one scale, the paper's)"
    add("--grid", nargs="+", choices=GRID_NAMES, help=f"{grids} (default)")
    add("--bits", help="of codes, on each grid (4)", **several("bits"))
    add("--rank", help="ranks of the svd score (8)", **several("rank"))
    add("--seeds", type=int, default=SEEDS, help="seeds of the random choice (3)")


def _add_contestants(parser: argparse.ArgumentParser) -> None:
    """Options of whole configs to compare."""
    group = parser.add_argument_group("presets that are compared", "each with the further choices given here")
    names = ["default", *PRESETS]
    told = "whole configs to compare"
    group.add_argument("--preset", nargs="+", type=preset_word, choices=names, default=[], help=told)
    add_rows(group, "evaluate")


def request_of(options: argparse.Namespace) -> "EvaluationRequest":
    """The request that the options express: its fields have their names."""
    from svdq_hf.evaluation import EvaluationRequest

    names = [one.name for one in fields(EvaluationRequest) if one.name != "choices"]
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    choices = given_choices(options, [name for name in CHOICES if name not in SWEPT])
    if choices and not options.preset:
        given["preset"] = ["default"]
    if (options.preset or choices) and not given.keys() & set(SWEPT):
        given["saliency"] = []
    return EvaluationRequest(**given, choices=choices)


SWEPT: Final = ("k", "saliency", "grid", "bits", "rank")
"""The options of scores that are compared; without any of them only presets are, where there are some."""


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
