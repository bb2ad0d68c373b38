"""Every public function, called with every wrong kind of argument: an error of ours that names the argument.

The functions and what they take are read from the package, so that a new one is tried by itself.
"""

import importlib
import inspect
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from places import ROOT
from torch import nn

from svdq_hf import SVDQConfig, SVDQLinear
from svdq_hf.core.arguments import is_a

MODULES = ("svdq_hf", "svdq_hf.hub", "svdq_hf.card", "svdq_hf.adapters", "svdq_hf.checkpoint")
WRONG = (None, True, 5, 1.5, float("nan"), "x", b"x", [1], ["x"], {"a": 1}, {1}, object(), int, Path("x"))
FILLINGS = (None, "x", True, 1, 1.5, (), {}, nn.Linear(2, 2), SVDQConfig())
"""One of these is right for whatever else a function takes."""


def public_functions() -> Iterator[Callable[..., Any]]:
    for name in MODULES:
        module = importlib.import_module(name)
        members = {getattr(module, member) for member in module.__all__}
        yield from sorted(filter(inspect.isfunction, members), key=lambda function: function.__name__)


FUNCTIONS = {function.__name__: function for function in public_functions()}


def hints_of(function: Callable[..., Any]) -> dict[str, Any]:
    """What each parameter may be, but the ones that take in all that is left."""
    hints, parameters = get_type_hints(function), inspect.signature(function).parameters
    left = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return {name: hints[name] for name, parameter in parameters.items() if parameter.kind not in left}


CASES = [
    pytest.param(name, parameter, value, id=f"{name}-{parameter}-{value!r:.20}")
    for name, function in FUNCTIONS.items()
    for parameter, hint in hints_of(function).items()
    for value in WRONG
    if not is_a(value, hint)
]


def filling(hint: Any) -> object:
    return next(value for value in FILLINGS if is_a(value, hint))


def raised_by_us(error: BaseException) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    return Path(frames[-1].filename).is_relative_to(ROOT / "svdq_hf")


@pytest.mark.parametrize(("name", "parameter", "value"), CASES)
def test_an_argument_of_a_wrong_kind_is_named(name, parameter, value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    function = FUNCTIONS[name]
    given = {key: filling(hint) for key, hint in hints_of(function).items() if key != parameter}
    with pytest.raises((TypeError, ValueError), match=parameter) as caught:
        function(**given, **{parameter: value})
    assert raised_by_us(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_argument_too_many_or_unknown_is_an_error_of_the_function(name):
    parameters = inspect.signature(FUNCTIONS[name]).parameters.values()
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        assert name in ("push_model", "write_card")  # theirs go on to another function, which knows
        return
    with pytest.raises(TypeError, match=f"{name}.*nonsense"):
        FUNCTIONS[name](**{key: filling(hint) for key, hint in hints_of(FUNCTIONS[name]).items()}, nonsense=1)


CHOICES = [
    pytest.param(key, value, id=f"{key}-{value!r:.20}")
    for key, hint in hints_of(SVDQConfig.__init__).items()
    for value in WRONG
    if not is_a(value, hint)
]


@pytest.mark.parametrize(("key", "value"), CHOICES)
def test_a_choice_of_a_wrong_kind_is_named(key, value):
    with pytest.raises((TypeError, ValueError), match=key) as caught:
        SVDQConfig(**{key: value})
    assert raised_by_us(caught.value)


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
