"""Decorator that checks the arguments of a public function against its annotations, before it does anything.

What people mistype (a number as text, a dict for a config, one batch for a list of batches) would else be
found deep inside of another library, or too late. Not here: whether a value makes sense (ranges, names),
which the function itself checks.
"""

import inspect
import os
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, wraps
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

P = ParamSpec("P")
R = TypeVar("R")


def checked_arguments(**remedies: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorator: an argument that is not of its annotated type is a TypeError that names it.

    Args:
        remedies: by parameter, what to do instead, for what people mix up most.

    Returns:
        The decorator; the function keeps its signature and docstring.

    >>> @checked_arguments(workers="a whole number")
    ... def work(workers: int = 1) -> int:
    ...     return workers
    >>> work("2")
    Traceback (most recent call last):
        ...
    TypeError: work: workers='2' is a str, and must be int: a whole number
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
                raise TypeError(f"{function.__name__}: {error}") from None
            for name, value in given.items():
                several = signature.parameters[name].kind in _SEVERAL
                if not several and name in hints() and not is_a(value, hints()[name]):
                    raise TypeError(f"{function.__name__}: {_told(name, value, hints()[name], remedies)}")
            return function(*args, **kwargs)

        return checked

    return decorate


_SEVERAL = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def _told(name: str, value: object, hint: Any, remedies: Mapping[str, str]) -> str:
    shown = repr(value) if isinstance(value, str | bytes | Real | None) else ""
    given = f"={shown[:60]} is a {_name(type(value))}" if shown else f" is a {_name(type(value))}"
    remedy = f": {remedies[name]}" if name in remedies else ""
    return f"{name}{given}, and must be {_name(hint)}{remedy}"


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

    True is no number, a whole number is a float, text is no sequence, and a path may be any `os.PathLike`.

    Args:
        value: anything.
        hint: an annotation; one that is not understood admits everything.

    >>> is_a(1, float), is_a(True, int), is_a("ab", Sequence[str]), is_a(["a", 1], list[str])
    (True, False, False, False)
    """
    origin, inner = get_origin(hint), get_args(hint)
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
    """Whether a value is a collection of that kind; its items are looked at where that uses nothing up."""
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
