"""Evaluation: measures what quantizing costs, on tasks, in sweeps over configs, with a report.

>>> from svdq_hf.evaluation import EvaluationRequest
>>> EvaluationRequest("rte", model=["rte-seed0"], out="report").tokens
16384
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from svdq_hf.evaluation.request import EvaluationRequest, EvaluationResult
    from svdq_hf.evaluation.run import evaluate

__all__ = ["EvaluationRequest", "EvaluationResult", "evaluate"]

_PLACES = {"EvaluationRequest": "request", "EvaluationResult": "request", "evaluate": "run"}


def __getattr__(name: str) -> object:
    """The public names, imported when they are first used: making a report needs none of them.

    Raises:
        AttributeError: the package has no such name.
    """
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
