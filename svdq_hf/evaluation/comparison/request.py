"""Request of a comparison: what models are compared on. The keys have the names of the command's options.

Not here: the models (`evaluation.comparison.contestants`).
"""

from pathlib import Path
from typing import TypedDict

from svdq_hf.core.grid_values import require

TOKENS = 4096
"""Scored by default: they tell a change of loss to about 0.01 nats."""
TOKENS_SPOKEN = 1024
"""By default of speech, of which the encoder takes most of the time."""
CONTEXT = 1024


class Choices(TypedDict, total=False):
    """What models are compared on, and what is made of it.

    Attributes:
        text: a text file (or .jsonl with the key "text"); None: a text of the project's own.
        task: a GLUE task, for classifiers.
        data: the task's data, DIR/TASK/dev.jsonl; for speech a folder of recordings, NAME.wav and NAME.txt.
        speech: whether the models must be speech models.
        tokens: how many are scored.
        context: tokens that a model sees at once.
        speed: whether loading and running are measured as well.
        card: whether the figures go into the model cards of the quantized folders.
        out: folder for a page with tables and pictures.
    """

    text: str | Path | None
    task: str | None
    data: str | Path | None
    speech: bool
    tokens: int | None
    context: int | None
    speed: bool
    card: bool
    out: str | Path | None


def check(choices: Choices) -> None:
    """Refuse choices that make no sense, before anything is loaded.

    Args:
        choices: of the user.

    Raises:
        ValueError: a number too small, a file that is not there, or choices that exclude one another.
    """
    for name, value, least in (("tokens", choices.get("tokens"), 2), ("context", choices.get("context"), 4)):
        require(value is None or value >= least, name, value, f"a whole number from {least} on")
    text, task, speech = choices.get("text"), choices.get("task"), choices.get("speech", False)
    named = [f"--{name}" for name, value in (("text", text), ("task", task), ("speech", speech)) if value]
    if len(named) > 1:
        raise ValueError(
            f"{' and '.join(named)}: models are compared on one thing at a time; give one of them"
        )
    if text is not None and not Path(text).is_file():
        raise ValueError(f"--text {text}: no such file; leave it out for a text that comes along")
    if task is not None:
        _check_task(task)
    if choices.get("out") is not None:
        _check_out(Path(choices["out"] or ""))


def _check_task(task: str) -> None:
    from svdq_hf.evaluation.tasks.glue_tasks import task_of

    task_of(task)


def _check_out(out: Path) -> None:
    """Refuse a folder that could not be made."""
    there = next(one for one in (out, *out.absolute().parents) if one.exists())
    if not there.is_dir():
        raise ValueError(f"--out {out}: {there} is a file, no folder; name another folder")
