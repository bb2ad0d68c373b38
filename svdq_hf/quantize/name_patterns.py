"""Regular expressions on names of modules, matched in a time that no pattern can blow up.

Python's own matcher tries one way after the other, and a pattern such as `((a+)+)!` has too many ways. Here
each part of a pattern maps a set of start positions to the set of positions where it can end, which for
a name of n characters has at most n + 1 numbers; the matches are the same. Not here: what names mean
(`quantize.kept_dense`).
"""

import re
from collections.abc import Callable, Iterable
from re import _constants, _parser  # type: ignore[attr-defined]  # the parser of `re`, the same since 3.11
from typing import Any

LONGEST = 1000
"""Most characters of a pattern: time grows with its length, and no name needs more."""

DEEPEST = 20
"""Most groups inside each other."""

_REPEATS = (_constants.MAX_REPEAT, _constants.MIN_REPEAT)
_ASSERTIONS = (_constants.ASSERT, _constants.ASSERT_NOT)


def _is_word(character: str) -> bool:
    return character.isalnum() or character == "_"


def _is_edge(name: str, at: int) -> bool:
    before, after = name[at - 1 : at] if at else "", name[at : at + 1]
    return _is_word(before) != _is_word(after)


_PLACES: dict[Any, Callable[[str, int], bool]] = {
    _constants.AT_BEGINNING: lambda name, at: at == 0,
    _constants.AT_BEGINNING_STRING: lambda name, at: at == 0,
    _constants.AT_END: lambda name, at: at == len(name),
    _constants.AT_END_STRING: lambda name, at: at == len(name),
    _constants.AT_BOUNDARY: _is_edge,
    _constants.AT_NON_BOUNDARY: lambda name, at: bool(name) and not _is_edge(name, at),
}
"""Parts of a pattern that take no character: whether they hold at a position."""

_CLASSES: dict[Any, Callable[[str], bool]] = {
    _constants.CATEGORY_DIGIT: str.isdecimal,
    _constants.CATEGORY_NOT_DIGIT: lambda character: not character.isdecimal(),
    _constants.CATEGORY_SPACE: str.isspace,
    _constants.CATEGORY_NOT_SPACE: lambda character: not character.isspace(),
    _constants.CATEGORY_WORD: _is_word,
    _constants.CATEGORY_NOT_WORD: lambda character: not _is_word(character),
}


class NamePattern:
    r"""A regular expression without back references, flags and possessive repeats.

    Args:
        pattern: in Python's syntax.

    Raises:
        ValueError: it does not compile, is longer than `LONGEST`, or has a construct not supported here.

    >>> NamePattern(r"layers\.(1|2)\.mlp").ends("layers.2.mlp.up")
    {12}
    """

    def __init__(self, pattern: str) -> None:
        if len(pattern) > LONGEST:
            raise ValueError(f"it has {len(pattern)} characters, and names need at most {LONGEST}")
        try:
            self.tree = _parser.parse(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"it is no regular expression: {error}") from error
        if self.tree.state.flags != re.UNICODE:
            raise ValueError("it has flags, which names are matched without")
        _check(self.tree, DEEPEST)

    def ends(self, name: str) -> set[int]:
        """The positions in `name` where a match from its start can end; empty: there is no match."""
        return _Matching(name).sequence(self.tree, {0})


def _check(tree: Iterable[tuple[Any, Any]], depth: int) -> None:
    """Refuse constructs that `_Matching` does not support."""
    if not depth:
        raise ValueError(f"it has more than {DEEPEST} groups inside of each other")
    for kind, value in tree:
        for part in _parts(kind, value):
            _check(part, depth - 1)
        if kind in _ASSERTIONS and value[0] < 0 and len(set(value[1].getwidth())) > 1:
            raise ValueError("it looks behind by a pattern of no fixed width")


def _parts(kind: Any, value: Any) -> list[Any]:
    """The patterns inside a construct."""
    if kind in _REPEATS:
        return [value[2]]
    if kind is _constants.BRANCH:
        return list(value[1])
    if kind is _constants.SUBPATTERN and not value[1] and not value[2]:
        return [value[3]]
    if kind in _ASSERTIONS:
        return [value[1]]
    if kind not in _CHARACTERS and not (kind is _constants.AT and value in _PLACES):
        raise ValueError(f"it has {kind}, which names are matched without")
    return []


class _Matching:
    """Matching of patterns on one name; look-aheads and what is repeated are evaluated once per position."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.known: dict[tuple[int, int], bool] = {}
        self.ends: dict[tuple[int, int], set[int]] = {}

    def sequence(self, tree: Any, starts: set[int]) -> set[int]:
        """The positions where the parts of `tree`, in sequence, can end, from any of the start positions."""
        for kind, value in tree:
            if not starts:
                break
            starts = self.step(kind, value, starts)
        return starts

    def step(self, kind: Any, value: Any, starts: set[int]) -> set[int]:
        """`sequence` of one part."""
        if kind in _CHARACTERS:
            test, name = _CHARACTERS[kind], self.name
            return {at + 1 for at in starts if at < len(name) and test(value, name[at])}
        if kind in _REPEATS:
            least, most, tree = value
            return self.repeated(least, int(most), tree, starts)
        if kind is _constants.BRANCH:
            return set().union(*(self.sequence(branch, starts) for branch in value[1]))
        if kind is _constants.SUBPATTERN:
            return self.sequence(value[3], starts)
        if kind in _ASSERTIONS:
            direction, tree = value
            asked = kind is _constants.ASSERT
            return {at for at in starts if self.holds(direction, tree, at) == asked}
        return {at for at in starts if _PLACES[value](self.name, at)}

    def repeated(self, least: int, most: int, tree: Any, starts: set[int]) -> set[int]:
        """`sequence` of a repeated part: until no new position is found (they never decrease)."""
        for _ in range(least):
            before, starts = starts, self.from_each(tree, starts)
            if starts == before:
                break
        found, new = set(starts), starts
        for _ in range(most - least):
            new = self.from_each(tree, new) - found
            if not new:
                break
            found |= new
        return found

    def from_each(self, tree: Any, starts: set[int]) -> set[int]:
        """`sequence`, from each position once: repeats inside of repeats would else double with each."""
        for at in starts:
            if (id(tree), at) not in self.ends:
                self.ends[id(tree), at] = self.sequence(tree, {at})
        return set().union(*(self.ends[id(tree), at] for at in starts))

    def holds(self, direction: int, tree: Any, at: int) -> bool:
        """Whether a pattern matches ahead of a position, or behind it."""
        key = (id(tree), at)
        if key not in self.known:
            start = at if direction > 0 else at - tree.getwidth()[0]
            ends = self.sequence(tree, {start}) if start >= 0 else set()
            self.known[key] = bool(ends) if direction > 0 else at in ends
        return self.known[key]


def _is_in(items: Any, character: str) -> bool:
    negated = bool(items) and items[0][0] is _constants.NEGATE
    return negated != any(_is_one(kind, value, character) for kind, value in items[negated:])


def _is_one(kind: Any, value: Any, character: str) -> bool:
    if kind is _constants.LITERAL:
        return bool(ord(character) == value)
    if kind is _constants.RANGE:
        return bool(value[0] <= ord(character) <= value[1])
    return _CLASSES[value](character)


_CHARACTERS: dict[Any, Callable[[Any, str], bool]] = {
    _constants.LITERAL: lambda value, character: ord(character) == value,
    _constants.NOT_LITERAL: lambda value, character: ord(character) != value,
    _constants.ANY: lambda value, character: character != "\n",
    _constants.IN: _is_in,
}
"""Parts of a pattern that are one character: a test of it."""
