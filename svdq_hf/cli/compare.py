"""`svdq compare`: how much worse, smaller and faster models are than a reference; a table and a verdict.

Not here: the comparison itself (`evaluation.comparison`), whole sweeps over choices (`cli.evaluate`).
"""

import argparse
import copy
import sys
from typing import TYPE_CHECKING, Any

from svdq_hf.cli.options import add_choices, config_of, examples
from svdq_hf.config.choices import CHOICES

if TYPE_CHECKING:
    from rich.table import Table

    from svdq_hf.config import SVDQConfig
    from svdq_hf.evaluation.comparison.result import ComparisonResult
    from svdq_hf.evaluation.comparison.table import Row

EXAMPLE = "svdq compare my-model --preset best --preset small"
TITLES, COLUMN = 18, 15
"""Widths of the table, in letters: of the titles, and of one model."""
KEYS = ("text", "task", "data", "speech", "tokens", "context", "speed", "card", "out")


def add(commands: Any) -> argparse.ArgumentParser:
    """Add the command's parser to those of `svdq`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "compare",
        help="how much worse, smaller and faster a model is than another",
        **examples(EXAMPLE, "svdq compare my-model my-model-4bit --out report"),
    )
    add = parser.add_argument
    add("model", help="the reference: a folder, or the Hub's user/model")
    add("others", nargs="*", metavar="other", help="folders, quantized or dense; none: what svdq makes of it")
    add("--text", help="a text file to read (a text that comes along)")
    add("--task", help="for classifiers: a GLUE task, cola, mnli, mrpc, qnli, qqp, rte, sst2 or stsb")
    add("--data", help="folder with TASK/dev.jsonl (or tsv, csv, parquet); or NAME.wav and NAME.txt")
    add("--speech", action="store_true", help="the models are speech models (which is found out anyway)")
    add("--tokens", type=int, help="tokens that are scored (4096; of speech 1024)")
    add("--context", type=int, help="tokens that a model sees at once (1024)")
    add("--no-speed", dest="speed", action="store_false", help="do not measure speed and memory")
    add("--card", action="store_true", help="write the figures into the quantized folders' model cards")
    add("--out", metavar="FOLDER", help="write a page with tables and pictures there")
    add_choices(parser, "quantize", several_presets=True)
    return parser


def run(options: argparse.Namespace) -> dict[str, object]:
    """Compare, and print the table and the verdicts; returns what `--json` prints.

    Args:
        options: the parsed command line.
    """
    from svdq_hf.evaluation.comparison.contestants import entrants
    from svdq_hf.evaluation.comparison.run import Run

    others = [*options.others, *configs_of(options)]
    choices: Any = {key: getattr(options, key) for key in KEYS}
    tell = (lambda line: None) if options.quiet else _tell
    result = Run(entrants(options.model, others), choices, tell).result()
    if not options.quiet:
        show(result)
    return result.to_dict()


def configs_of(options: argparse.Namespace) -> "list[SVDQConfig]":
    """A config for each preset; without one, one config where any choice is given.

    Args:
        options: the parsed command line.
    """
    given = any(hasattr(options, name) for name in CHOICES)
    made = []
    for preset in options.preset or ([None] if given else []):
        one = copy.copy(options)
        one.preset = preset
        made.append(config_of(one))
    return made


def _tell(line: str) -> None:
    print(line, file=sys.stderr)


def show(result: "ComparisonResult") -> None:
    """Print tables as wide as the terminal, the verdicts and what to try next.

    Args:
        result: of the comparison.
    """
    from svdq_hf.cli.tables import console
    from svdq_hf.evaluation.comparison.table import rows

    screen = console()
    for table in tables([model.name for model in result.models], rows(result), screen.width):
        screen.print(table)
    print(f"{result.n} {result.counted} of {result.measured_on}; in {result.seconds:.0f} s")
    for model in result.others:
        print(model.verdict)
        for hint in model.advice:
            print(f"  {hint}")
    for note in [*result.notes, *(f"{file}: says so now" for file in result.cards)]:
        print(note)
    if result.page is not None:
        print(f"read {result.page}")


def tables(names: list[str], rows: "list[Row]", width: int) -> "list[Table]":
    """The table in as many parts as the width asks for, each beginning with the reference.

    Args:
        names: of the models.
        rows: of all models.
        width: in letters.
    """
    at_once = max(1, (width - TITLES) // COLUMN - 1)
    starts = range(1, len(names), at_once)
    return [_table(names, rows, [0, *range(start, min(start + at_once, len(names)))]) for start in starts]


def _table(names: list[str], rows: "list[Row]", columns: list[int]) -> "Table":
    from rich.table import Table

    from svdq_hf.cli.tables import plain

    table = Table(box=None, pad_edge=False, padding=(0, 0, 0, 1))
    table.add_column("", no_wrap=True, width=TITLES)
    for column in columns:
        table.add_column(plain(names[column]), justify="right", overflow="fold", width=COLUMN - 1)
    for row in rows:
        table.add_row(row.title, *(plain(row.texts[column]) for column in columns))
    return table
