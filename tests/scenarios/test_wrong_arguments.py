"""Every public function, called with every wrong kind of argument: an error of ours that names the argument.

The functions and what they take are read from the package, so that a new one is tried by itself.
"""

import importlib
import inspect
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Unpack, get_args, get_origin, get_type_hints

import pytest
from places import ROOT
from torch import nn

from svdq_hf import Footprint, SVDQConfig, SVDQLinear
from svdq_hf.core.arguments import is_a

MODULES = ("svdq_hf", "svdq_hf.hub", "svdq_hf.card", "svdq_hf.adapters", "svdq_hf.checkpoint", "svdq_hf.demo")
WRONG = (None, True, 5, 1.5, float("nan"), "x", b"x", [1], ["x"], {"a": 1}, {1}, object(), int, Path("x"))
FILLINGS = (None, "x", True, 1, 1.5, (), {}, nn.Linear(2, 2), SVDQConfig(), Footprint([], 0))
"""One of these is right for whatever else a function takes."""


def public_functions() -> Iterator[Callable[..., Any]]:
    for name in MODULES:
        module = importlib.import_module(name)
        names = getattr(module, "__all__", ("default_model", "run_demo"))
        members = {getattr(module, member) for member in names}
        yield from sorted(filter(inspect.isfunction, members), key=lambda function: function.__name__)


FUNCTIONS = {function.__name__: function for function in public_functions()}


def hints_of(function: Callable[..., Any]) -> dict[str, Any]:
    """What each parameter may be, those of a typed dict too, but not what takes in all that is left."""
    hints, parameters = get_type_hints(function), inspect.signature(function).parameters
    left = [name for name, one in parameters.items() if one.kind is inspect.Parameter.VAR_KEYWORD]
    typed = [get_args(hints[name])[0] for name in left if get_origin(hints[name]) is Unpack]
    plain = {name: hints[name] for name in parameters if name in hints and name not in left}
    return {**plain, **{name: hint for keys in typed for name, hint in get_type_hints(keys).items()}}


CASES = [
    pytest.param(name, parameter, id=f"{name}-{parameter}")
    for name, function in FUNCTIONS.items()
    for parameter, hint in hints_of(function).items()
    if not is_a(WRONG, hint) or not is_a(None, hint)  # else it takes anything
]


def filling(hint: Any) -> object:
    return next(value for value in FILLINGS if is_a(value, hint))


def raised_by_us(error: BaseException) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    return Path(frames[-1].filename).is_relative_to(ROOT / "svdq_hf")


@pytest.mark.parametrize(("name", "parameter"), CASES)
def test_an_argument_of_a_wrong_kind_is_named(name, parameter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    function, hints = FUNCTIONS[name], hints_of(FUNCTIONS[name])
    given = {key: filling(hint) for key, hint in hints.items() if key != parameter}
    for value in WRONG:
        if is_a(value, hints[parameter]):
            continue
        with pytest.raises((TypeError, ValueError), match=parameter) as caught:
            function(**given, **{parameter: value})
        assert raised_by_us(caught.value), value
        assert "\n" not in str(caught.value), value
        assert list(tmp_path.iterdir()) == [], value


@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_argument_too_many_or_unknown_is_an_error_of_the_function(name):
    with pytest.raises(TypeError, match=f"{name}.*nonsense"):
        FUNCTIONS[name](**{key: filling(hint) for key, hint in hints_of(FUNCTIONS[name]).items()}, nonsense=1)


CHOICES = hints_of(SVDQConfig.__init__)


@pytest.mark.parametrize("key", CHOICES)
def test_a_choice_of_a_wrong_kind_is_named(key):
    for value in WRONG:
        if is_a(value, CHOICES[key]):
            continue
        with pytest.raises((TypeError, ValueError), match=key) as caught:
            SVDQConfig(**{key: value})
        assert raised_by_us(caught.value), value


@pytest.mark.parametrize("value", [None, 5, "x", [1], object()])
def test_a_config_that_is_no_dict_is_named(value):
    with pytest.raises((TypeError, ValueError), match="config"):
        SVDQConfig.from_dict(value)


@pytest.mark.parametrize("key", ["in_features", "out_features", "scheme"])
@pytest.mark.parametrize("value", ["x", -1, 0, 1.5, [1], None])
def test_a_layer_of_a_wrong_size_is_named(key, value):
    if key == "scheme" and value is None:
        assert SVDQLinear(4, 4, None, device="meta").scheme.k == 256
        return
    sizes = {"in_features": 4, "out_features": 4, key: value}
    with pytest.raises((TypeError, ValueError), match=key) as caught:
        SVDQLinear(**sizes, device="meta")
    assert raised_by_us(caught.value)
