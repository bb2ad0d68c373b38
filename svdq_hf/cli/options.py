"""Options of the commands, made from the table of choices; a parser that suggests the nearest word; examples.

Imports neither torch nor transformers. Not here: the choices themselves (`config.choices`).
"""

import argparse
import difflib
import os
import re
from collections.abc import Collection, Iterable
from typing import Any, NoReturn

from svdq_hf.config.choice_row import Choice, Option
from svdq_hf.config.choices import CHOICES, DATA
from svdq_hf.config.presets import PRESETS

NO_PRESET = "default"
"""The word for no preset, where several configs are asked for."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors suggest the word that was probably meant; abbreviated options are refused."""

    def __init__(self, **choices: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **choices})

    def error(self, message: str) -> NoReturn:
        """Print the usage and the message, with the nearest known word for an unknown one; exit code 2."""
        super().error(message + _hint(message, self._option_string_actions))


def _hint(message: str, options: Iterable[str]) -> str:
    """The end of an error about an unknown word: the nearest known one, or nothing.

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
    preset = preset_word(word)
    if message.startswith("argument --preset") and preset in PRESETS and preset not in known:
        return _elsewhere(preset, only_grid="calibrated" in known)  # as of `svdq sensitivity`
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def preset_word(word: str) -> str:
    """A preset's name as it was typed: options have hyphens, names underscores.

    >>> preset_word("Self-Calibrated")
    'self_calibrated'
    """
    return word.replace("-", "_").lower()


def _elsewhere(preset: str, only_grid: bool) -> str:
    """Where a preset can be had that a command does not take, as the end of an error."""
    command = f"svdq quantize MODEL OUT --preset {preset}"
    if PRESETS[preset].needs_data:
        return f"; {preset} needs data: {command} --calibration FILE"
    if only_grid:
        return f"; {preset} chooses no grid of its own: leave it out"
    return f"; {preset} runs the dense model, which is not done while loading: {command}, then give OUT"


def add_choices(
    parser: argparse.ArgumentParser,
    command: str,
    *,
    several_presets: bool = False,
    only: Collection[str] | None = None,
) -> None:
    """Add options for the choices of SVDQConfig that a command takes.

    An option that is not given is absent from the result, so that the config's defaults hold.

    Args:
        parser: the command's parser.
        command: its name, or that of another that takes the same choices.
        several_presets: whether `--preset` may be given again, for another config.
        only: the choices that have an effect; None: all.
    """
    group = parser.add_argument_group("choices")
    in_memory = command == "quantize"
    takes_data = in_memory and not several_presets
    presets = [
        name
        for name, one in PRESETS.items()
        if (takes_data or not one.needs_data)
        and (in_memory or not one.runs_dense)
        and (only is None or not one.changes.keys().isdisjoint(only))
    ]
    told = "; ".join(f"{name}: {PRESETS[name].help}" for name in presets)
    if several_presets:
        more = f"start from a preset, and once more from another; {NO_PRESET}: SVDQConfig(); {told}"
        names = [NO_PRESET, *presets]
        group.add_argument("--preset", type=preset_word, choices=names, action="append", help=more)
    else:
        told = f"start from a preset; {told}"
        group.add_argument("--preset", type=preset_word, choices=presets, help=told)
    add_rows(group, command, only)


def add_rows(group: Any, command: str, only: Collection[str] | None = None) -> None:
    """Add an option for each row of the table of choices that a command takes.

    Args:
        group: of a parser.
        command: its name.
        only: the choices that have an effect; None: all.
    """
    for name, row in CHOICES.items():
        if only is not None and name not in only:
            continue
        if row.option is not None and command in row.option.commands:
            group.add_argument(
                option_name(name, row.option),
                dest=name,
                default=argparse.SUPPRESS,
                help=_help(row, row.option),
                **_kind(row, row.option),
            )


def option_name(name: str, option: Option) -> str:
    """Name of a choice on the command line.

    >>> option_name("group_size", Option())
    '--group-size'
    """
    return option.name or "--" + name.replace("_", "-")


def several(name: str) -> dict[str, Any]:
    """Keywords for argparse's `add_argument`, for an option that takes several values of one choice.

    Args:
        name: of the choice.
    """
    row = CHOICES[name]
    option = row.option or Option()
    return {
        "nargs": "+",
        "type": option.parse,
        "choices": option.values or None,
        "metavar": name.upper() if option.values else None,
    }


def _kind(row: Choice, option: Option) -> dict[str, Any]:
    """Keywords for argparse's `add_argument`, by the kind of the choice."""
    if row.is_flag:
        return {"action": argparse.BooleanOptionalAction if row.default else "store_true"}
    if option.repeats:
        return {"action": "append", "metavar": "NAME"}
    return {"type": option.parse, "choices": option.values or None}


def _help(row: Choice, option: Option) -> str:
    text = row.help + (f"; {option.more}" if option.more else "")
    shown = "" if row.is_flag or row.default in (None, False) else f" ({row.default})"
    return (text + shown).replace("%", "%%")


def given_choices(options: argparse.Namespace, names: Iterable[str] = tuple(CHOICES)) -> dict[str, Any]:
    """The choices that were given on the command line, as SVDQConfig takes them.

    Args:
        options: the parsed command line.
        names: of the choices to look for.
    """
    given = {name: getattr(options, name) for name in names if hasattr(options, name)}
    return given | ({"error_feedback": True} if given.get("error_feedback") == DATA else {})


def config_of(options: argparse.Namespace) -> Any:
    """The SVDQConfig that the options express.

    Args:
        options: the parsed command line.

    Raises:
        ValueError: an impossible value, or choices that exclude one another.
    """
    from svdq_hf.config import SVDQConfig

    given = given_choices(options)
    if "target_bits" in given and "k" in given:
        raise ValueError("--target-bits spends salient weights instead of --k: give one of them")
    changes = {} if options.preset in (None, NO_PRESET) else PRESETS[options.preset].changes
    return SVDQConfig(**{**changes, **given})


def examples(*lines: str) -> dict[str, Any]:
    r"""Keywords for argparse's `add_parser`: examples below the help.

    Args:
        lines: commands as they are typed.

    >>> examples("svdq demo")["epilog"]
    'example:\n  svdq demo'
    """
    told = "\n".join(f"  {line}" for line in lines)
    return {
        "epilog": f"example{'s' * (len(lines) > 1)}:\n{told}",
        "formatter_class": argparse.RawDescriptionHelpFormatter,
    }


def check_there(model: str) -> None:
    """Refuse a model that is not there, before anything large is imported.

    Args:
        model: a folder, or the Hub's user/model, which is downloaded.

    Raises:
        ValueError: neither a folder nor a name that the Hub could have.
        OSError: the Hub does not have it, or cannot be reached.
    """
    if not os.path.isdir(model):
        from svdq_hf.hub.client import local_folder

        local_folder(model)


def add_drop(parser: argparse.ArgumentParser) -> None:
    """What of a model's files an output may lack, by name."""
    drop = "tensor or module of the files that the model's class has no place for, to be left out"
    parser.add_argument("--drop", action="append", default=[], metavar="NAME", help=drop)
