"""Evaluation: what quantizing costs: one model beside another, and sweeps over configs with a report.

>>> from svdq_hf.evaluation import EvaluationRequest
>>> EvaluationRequest("rte", model=["rte-seed0"], out="report").tokens
16384
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from svdq_hf.evaluation.comparison.result import ComparedModel, ComparisonResult, Flips, Quality
    from svdq_hf.evaluation.comparison.run import compare
    from svdq_hf.evaluation.comparison.statistics import Estimate
    from svdq_hf.evaluation.request import EvaluationRequest, EvaluationResult
    from svdq_hf.evaluation.run import evaluate

__all__ = [
    "ComparedModel",
    "ComparisonResult",
    "Estimate",
    "EvaluationRequest",
    "EvaluationResult",
    "Flips",
    "Quality",
    "compare",
    "evaluate",
]

_PLACES = {
    "ComparedModel": "comparison.result",
    "ComparisonResult": "comparison.result",
    "Estimate": "comparison.statistics",
    "EvaluationRequest": "request",
    "EvaluationResult": "request",
    "Flips": "comparison.result",
    "Quality": "comparison.result",
    "compare": "comparison.run",
    "evaluate": "run",
}


def __getattr__(name: str) -> object:
    """The public names, imported when they are first used: making a report needs none of them.

    Raises:
        AttributeError: the package has no such name.
    """
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
