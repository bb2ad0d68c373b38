"""Options of the commands, made from the table of choices; and a parser that says what was meant.

Imports neither torch nor transformers.
"""

import argparse
import difflib
import re
from collections.abc import Iterable
from typing import Any, NoReturn

from svdq_hf.config.choices import CHOICES, Choice, Option
from svdq_hf.config.presets import PRESETS


class Parser(argparse.ArgumentParser):
    """A parser whose errors name the word that was meant; options are not taken for longer ones."""

    def __init__(self, **choices: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **choices})

    def error(self, message: str) -> NoReturn:
        """Print the usage, the message and, of a word that is not known, the nearest one; exit code 2."""
        super().error(message + _hint(message, self._option_string_actions))


def _hint(message: str, options: Iterable[str]) -> str:
    """What was meant, where it is near: of argparse's two messages about a word that is not known.

    >>> _hint("unrecognized arguments: --grup-size 32", ["--group-size", "--k"])
    '; did you mean --group-size?'
    """
    choice = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message)
    strange = re.match(r"unrecognized arguments: (-[^\s=]*)", message)
    if choice:
        word, known = choice[1], re.findall(r"[^\s',]+", choice[2])
    elif strange:
        word, known = strange[1], list(options)
    else:
        return ""
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def add_choices(parser: argparse.ArgumentParser, command: str) -> None:
    """The choices of SVDQConfig that a command takes; the config's defaults hold where none is given."""
    group = parser.add_argument_group("choices")
    presets = {name: preset for name, preset in PRESETS.items() if not preset.needs_data}
    told = "; ".join(f"{name}: {preset.help}" for name, preset in presets.items())
    group.add_argument("--preset", choices=presets, help=f"start from a preset; {told}")
    for name, row in CHOICES.items():
        if row.option is not None and command in row.option.commands:
            group.add_argument(
                option_name(name, row.option),
                dest=name,
                default=argparse.SUPPRESS,
                help=_help(row, row.option),
                **_kind(row, row.option),
            )


def option_name(name: str, option: Option) -> str:
    """How a choice is called on the command line.

    >>> option_name("group_size", Option())
    '--group-size'
    """
    return option.name or "--" + name.replace("_", "-")


def several(name: str, default: list[Any] | tuple[Any, ...]) -> dict[str, Any]:
    """What argparse needs for an option that takes several values of one choice, to compare them."""
    row = CHOICES[name]
    option = row.option or Option()
    return {
        "nargs": "+",
        "type": option.parse,
        "default": default,
        "choices": option.values or None,
        "metavar": name.upper() if option.values else None,
    }


def _kind(row: Choice, option: Option) -> dict[str, Any]:
    """What argparse is to do with the option."""
    if row.is_flag:
        return {"action": argparse.BooleanOptionalAction if row.default else "store_true"}
    if option.repeats:
        return {"action": "append", "metavar": "NAME"}
    return {"type": option.parse, "choices": option.values or None}


def _help(row: Choice, option: Option) -> str:
    text = row.help + (f"; {option.more}" if option.more else "")
    shown = "" if row.is_flag or row.default in (None, False) else f" ({row.default})"
    return (text + shown).replace("%", "%%")


def config_of(options: argparse.Namespace) -> Any:
    """The SVDQConfig that was asked for.

    Raises:
        ValueError: a value that is none, or choices that exclude one another.
    """
    from svdq_hf.config import SVDQConfig

    given = {name: getattr(options, name) for name in CHOICES if hasattr(options, name)}
    if "target_bits" in given and "k" in given:
        raise ValueError("--target-bits spends salient weights instead of --k: give one of them")
    changes = PRESETS[options.preset].changes if options.preset else {}
    return SVDQConfig(**{**changes, **given})


def add_drop(parser: argparse.ArgumentParser) -> None:
    """What of a model's files an output may lack, by name."""
    drop = "tensor or module of the files that the model's class has no place for, to be left out"
    parser.add_argument("--drop", action="append", default=[], metavar="NAME", help=drop)
