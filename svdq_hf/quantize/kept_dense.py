"""Names of modules that the user keeps dense (`modules_to_not_convert`), and how they match modules.

A name matches as in transformers' `should_convert_module`: at the start of a module's name up to a dot, as a
regular expression with the same end, or at the end of the module's name. It also matches as a run of dotted
components: "vision_tower" and "layers.0" keep `model.vision_tower.layers.0.mlp`. (A number alone is no such
run: "0" would keep a layer of every block.) Plain names are looked up, so that thousands of them cost little;
regular expressions are matched by `quantize.name_patterns`.
"""

import re
from collections.abc import Iterable, Iterator
from itertools import combinations

from svdq_hf.config import SVDQConfig
from svdq_hf.quantize.name_patterns import NamePattern

_PLAIN = re.compile(r"[\w.\-/ ]*\Z")
"""Matches names without special characters of regular expressions, the dot aside."""

MOST_PATTERNS = 256
"""Most regular expressions (plain names do not count), since each is tried on each module."""


class KeptDense:
    r"""Names of modules to keep dense, to be compared with one module after the other.

    Args:
        names: of modules, or regular expressions.

    Raises:
        ValueError: one is no usable regular expression, or there are more than `MOST_PATTERNS`.

    >>> kept = KeptDense(["vision_tower", "layers.0", r"layers\.1\.mlp.*"])
    >>> [kept.keeps(f"model.layers.{name}") for name in ("0.mlp.up", "1.mlp.up", "10.mlp.up")]
    [True, False, False]
    >>> kept.names("layers.1.mlp.up"), kept.names("model.vision_tower.fc")
    (['layers\\.1\\.mlp.*'], ['vision_tower'])
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.all = list(names)
        self.plain = {name for name in self.all if _PLAIN.match(name)}
        self.patterns = {name: _pattern(name) for name in self.all if name not in self.plain}
        if len(self.patterns) > MOST_PATTERNS:
            raise ValueError(
                f"modules_to_not_convert has {len(self.patterns)} regular expressions: at most "
                f"{MOST_PATTERNS}; plain names may be as many as you like"
            )
        self.dotted: dict[tuple[int, ...], set[str]] = {}
        """Plain names by their length and the places of their dots, which stand for any character."""
        for name in self.plain:
            if "." in name:
                self.dotted.setdefault((len(name), *_dots(name)), set()).add(name)

    @classmethod
    def of(cls, config: SVDQConfig) -> "KeptDense":
        """The names of a config."""
        return cls(config.modules_to_not_convert or [])

    @classmethod
    def of_file(cls, config: SVDQConfig) -> "KeptDense":
        """The usable names of a config that came with a file, whose tensors decide anyway."""
        names = config.modules_to_not_convert or []
        return cls([name for name in names if _can_be_used(name)][:MOST_PATTERNS])

    def keeps(self, module: str) -> bool:
        """Whether a module of this name stays dense."""
        return next(self._found(module), None) is not None

    def names(self, module: str) -> list[str]:
        """The names, as they were given, that keep a module of this name dense."""
        found = set(self._found(module))
        return [name for name in self.all if name in found]

    def _found(self, module: str) -> Iterator[str]:
        yield from (name for name in _runs(module) if name in self.plain and not name.isdecimal())
        yield from (end for at in range(len(module) + 1) if (end := module[at:]) in self.plain)
        yield from (start for start in _starts(module) if start in self.plain)
        yield from self._dotted(module)
        for name, pattern in self.patterns.items():
            if module.endswith(name) or any(_is_boundary(module, end) for end in pattern.ends(module)):
                yield name

    def _dotted(self, module: str) -> Iterator[str]:
        """Plain names with dots, matched as regular expressions, in which a dot stands for any character."""
        for (length, *dots), names in self.dotted.items():
            if length <= len(module) and _is_boundary(module, length):
                start = list(module[:length])
                for dot in dots:
                    start[dot] = "."
                if "".join(start) in names:
                    yield "".join(start)


def _pattern(name: str) -> NamePattern:
    try:
        return NamePattern(name)
    except ValueError as error:
        raise ValueError(f"modules_to_not_convert: {name!r} cannot be used: {error}") from error


def _can_be_used(name: str) -> bool:
    try:
        KeptDense([name])
    except ValueError:
        return False
    return True


def _runs(module: str) -> Iterator[str]:
    """All runs of dotted components of a name.

    >>> sorted(_runs("a.b.c"))
    ['a', 'a.b', 'a.b.c', 'b', 'b.c', 'c']
    """
    parts = module.split(".")
    return (".".join(parts[start:end]) for start, end in combinations(range(len(parts) + 1), 2))


def _starts(module: str) -> Iterator[str]:
    return (module[:at] for at in range(1, len(module) + 1) if _is_boundary(module, at))


def _dots(name: str) -> list[int]:
    return [at for at, character in enumerate(name) if character == "."]


def _is_boundary(module: str, at: int) -> bool:
    """Whether a match may end at a position: at the end of the name, before a dot or after one."""
    return at == len(module) or module[at] == "." or (at > 0 and module[at - 1] == ".")
