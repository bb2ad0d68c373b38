"""Decorator that checks the arguments of a public function against its annotations, before it does anything.

What people mistype (a number as text, a dict for a config, one batch for a list of batches) would else be
found deep inside of another library, or too late. Not here: whether a value makes sense (ranges, names),
which the function itself checks.
"""

import inspect
import os
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, wraps
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar, Union, Unpack, get_args, get_origin, get_type_hints

P = ParamSpec("P")
R = TypeVar("R")


class WrongKind(TypeError, ValueError):
    """An argument of a wrong kind: a TypeError to Python, a ValueError as all that svdq_hf refuses."""


def checked_arguments(**remedies: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorator: an argument that is not of its annotated type is a `WrongKind` that names it.

    Args:
        remedies: by parameter name, what to do instead, for what people mix up most.

    Returns:
        The decorator; the function keeps its signature and docstring.

    Raises:
        WrongKind: the decorated function was called with an unknown, a missing or a wrongly typed argument.

    >>> @checked_arguments(workers="a whole number, please")
    ... def work(workers: int = 1) -> int:
    ...     return workers
    >>> work("2")
    Traceback (most recent call last):
        ...
    svdq_hf.core.arguments.WrongKind: work: workers='2' is a str, no int: a whole number, please
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)

        @cache
        def hints() -> dict[str, Any]:
            return get_type_hints(function)  # late: what they name may not be imported yet

        @wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                given = signature.bind(*args, **kwargs).arguments
            except TypeError as error:
                raise WrongKind(f"{function.__name__}: {error}") from None
            try:
                for name, value, hint in _singly(given, signature, hints()):
                    if not is_a(value, hint):
                        raise WrongKind(_told(name, value, hint, remedies))
            except WrongKind as error:
                raise WrongKind(f"{function.__name__}: {error}") from None
            return function(*args, **kwargs)

        return checked

    return decorate


def _singly(
    given: Mapping[str, Any], signature: inspect.Signature, hints: Mapping[str, Any]
) -> Iterator[tuple[str, object, Any]]:
    """Each argument with its annotation; of `**kwargs: Unpack[SomeTypedDict]` each key by itself.

    Raises:
        WrongKind: a key is none of the typed dict's.
    """
    for name, value in given.items():
        kind, hint = signature.parameters[name].kind, hints.get(name, Any)
        if kind is inspect.Parameter.VAR_KEYWORD and get_origin(hint) is Unpack:
            keys = get_type_hints(get_args(hint)[0])
            for key, one in value.items():
                if key not in keys:
                    raise WrongKind(f"got an unexpected keyword argument {key!r}; it takes {list(keys)}")
                yield key, one, keys[key]
        elif kind not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
            yield name, value, hint


def _told(name: str, value: object, hint: Any, remedies: Mapping[str, str]) -> str:
    shown = repr(value) if isinstance(value, str | bytes | Real | None) else ""
    kind = _name(type(value))
    given = f"{f'={shown[:60]}' if shown else ''} is a{'n' * (kind[0] in 'aeiouAEIOU')} {kind}"
    wanted = f"no {_name(hint)}: {remedies[name]}" if name in remedies else f"and must be {_name(hint)}"
    return f"{name}{given}, {wanted}"


def _name(hint: Any) -> str:
    """A type as a person would say it.

    >>> _name(str | Path | None), _name(Literal["exact", "fast"]), _name(dict[str, Any])
    ('str, Path or None', "'exact' or 'fast'", 'dict')
    """
    options = [repr(one) for one in get_args(hint)] if get_origin(hint) is Literal else []
    options = options or [_name(one) for one in get_args(hint) if _is_union(hint)]
    if options:
        return f"{', '.join(options[:-1])} or {options[-1]}" if len(options) > 1 else options[0]
    plain = get_origin(hint) or hint
    return "None" if plain is types.NoneType else getattr(plain, "__name__", str(plain))


def _is_union(hint: Any) -> bool:
    return get_origin(hint) in (Union, types.UnionType)


def is_a(value: object, hint: Any) -> bool:
    """Whether a value is of an annotated type, as a person means it.

    True is not a number, an int passes as a float, a str is not a sequence, and a path may be any
    `os.PathLike`.

    Args:
        value: anything.
        hint: an annotation; one of a kind not handled here admits everything.

    >>> is_a(1, float), is_a(True, int), is_a("ab", Sequence[str]), is_a(["a", 1], list[str])
    (True, False, False, False)
    """
    origin, inner = get_origin(hint), get_args(hint)
    if hint in (Any, object):
        return True
    if _is_union(hint):
        return any(is_a(value, one) for one in inner)
    if origin is Literal:
        return any(type(value) is type(one) and value == one for one in inner)
    if origin is not None:
        return _is_collection(value, origin, inner)
    plain = {int: Integral, float: Real, Path: os.PathLike, None: types.NoneType}.get(hint, hint)
    if plain is Any or not isinstance(plain, type):  # `Any` is a class, since Python 3.11
        return True
    if plain in (Integral, Real):
        return isinstance(value, plain) and not isinstance(value, bool)
    return isinstance(value, plain)


def _is_collection(value: object, origin: Any, inner: tuple[Any, ...]) -> bool:
    """Whether a value is a collection of that kind; items are checked unless that would use them up."""
    if origin is Callable:
        return callable(value)
    if not isinstance(origin, type) or not issubclass(origin, Iterable):
        return not isinstance(origin, type) or isinstance(value, origin)
    if not isinstance(value, origin) or isinstance(value, str | bytes):
        return False
    if isinstance(value, Mapping):
        keys, values = inner if len(inner) == 2 else (Any, Any)
        return issubclass(origin, Mapping) and all(
            is_a(k, keys) and is_a(v, values) for k, v in value.items()
        )
    return not isinstance(value, Sequence) or all(is_a(one, inner[0]) for one in value if inner)
