"""Row of the table of choices: default, check, where a choice is stored, how the command line takes it.

Imports neither torch nor transformers. Not here: the rows (`config.choices`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple


class Check(NamedTuple):
    """What a value may be: as a predicate, and in words."""

    fits: Callable[[Any], bool]
    allowed: str


FLAG = Check(lambda value: type(value) is bool, "true or false")
"""Of what is on or off, and nothing else."""


class Option(NamedTuple):
    """How a choice is given on the command line."""

    parse: Callable[[str], Any] = str
    values: tuple[Any, ...] = ()
    """The allowed values; the command line refuses others. Empty: the check decides."""
    name: str = ""
    """Name of the option. Empty: made of the choice's name, as in `--group-size`."""
    repeats: bool = False
    """Whether it takes one name and may be given several times."""
    more: str = ""
    """Help that only the command line needs."""
    commands: tuple[str, ...] = ("quantize", "demo")


_OPTION = Option()


@dataclass(frozen=True)
class Choice:
    """One row of the table: a choice, its default, its check, and where it is stored and shown."""

    default: Any
    check: Check
    help: str
    """The choice in plain words; its row of docs/choices.md begins with them."""
    since: int = 1
    """The first version of the format whose files hold it."""
    before: Any = None
    """For a part of the grid that is newer than version 1: the value that older files imply."""
    of: Literal["grid", "files", ""] = ""
    """"grid": an attribute of `Grid`. "files": any value but the default needs format version `since`."""
    stored: bool = True
    """Whether files hold it; otherwise whoever quantizes or runs the model chooses."""
    option: Option | None = _OPTION
    """None: it is no command line option."""

    @property
    def is_flag(self) -> bool:
        """Whether it is on or off, and nothing else."""
        return self.check is FLAG


def is_count(value: object) -> bool:
    """Whether a value is an int from 0 on; True and False are not."""
    return type(value) is int and value >= 0
