"""Scores: which weights of a matrix matter most. The k best of them stay in FP32.

A score is one function, `weight [out, in] -> scores [out, in]`, and what else it needs are its
keyword-only parameters, by name: see `NEEDS`. Sources: `svd` is arXiv 2512.01343 (abs of the rank-8
part of the weight itself); `awq` and `spqr` are the scores that paper takes from arXiv 2306.00978 and
2306.03078 (the scores only, not the methods of these names); the others are baselines.
Not here: how many are kept (`sparse`), and how (`decompose`).
"""

import inspect
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from svdq_hf.core import svd as svd_
from svdq_hf.core.arguments import checked_arguments
from svdq_hf.core.hessian import damped_inverse

NEEDS = {
    "rank": "rank of the principal structure (config)",
    "seed": "seed of anything random (config)",
    "group": "columns that share a scale, an int (from the config and the layer)",
    "input_norm": "norm of each input over the calibration batches, [in]",
    "input_gram": "X.T @ X over the calibration batches, [in, in]",
    "tokens": "tokens in the calibration batches",
}
"""What a score may ask for, as keyword-only parameters."""

FROM_DATA = ("input_norm", "input_gram", "tokens")
"""Those of `NEEDS` that only batches can give."""

OUTLIER = 3.0
"""In `relative`: entries beyond this many root mean squares of their group are outliers of it."""


class Scored(NamedTuple):
    """Scores `[out, in]`, and what was measured on the way (numbers for the report, by name)."""

    scores: Tensor
    facts: dict[str, float]


ScoreFunction = Callable[..., Tensor | Scored]

_SCORES: dict[str, ScoreFunction] = {}


@checked_arguments(name='write @register_saliency("name")', replace="True or False")
def register_saliency(name: str, *, replace: bool = False) -> Callable[[ScoreFunction], ScoreFunction]:
    """Make a score known under `name`, for `SVDQConfig(saliency=name)`; a decorator.

    The function takes `weight` `[out, in]`, float32, and as keyword-only parameters any of `NEEDS`;
    it returns scores `[out, in]`, the larger the more salient, or a `Scored`.

    Raises:
        TypeError: it was given no name.
        ValueError: the name is taken (and not `replace`), or a parameter is none of `NEEDS`.

    >>> @register_saliency("last_columns", replace=True)
    ... def last_columns(weight):
    ...     return torch.arange(weight.shape[1]).expand_as(weight)
    >>> "last_columns" in saliency_names()
    True
    """

    @checked_arguments(function="one that takes a weight and returns its scores")
    def register(function: ScoreFunction) -> ScoreFunction:
        if name in _SCORES and not replace:
            raise ValueError(f"saliency {name!r} is registered already; pass replace=True to replace it")
        unknown = [need for need in _needs(function) if need not in NEEDS]
        if unknown:
            raise ValueError(
                f"saliency {name!r} asks for {unknown}; a score may ask for {list(NEEDS)}, as keyword-only"
            )
        _SCORES[name] = function
        return function

    return register


def saliency_names() -> list[str]:
    """The names of all registered scores."""
    return sorted(_SCORES)


def score(name: str, weight: Tensor, inputs: Mapping[str, Any]) -> Scored:
    """The scores `[out, in]` of `weight` `[out, in]`, float32, by the score called `name`.

    inputs: values for `NEEDS`; the score gets those it asks for.

    Raises:
        ValueError: no such score, it needs data and there is none, or it returned something that is
            not one number per weight, or it changed the weight.
    """
    if any(need not in inputs for need in score_needs(name)):
        raise no_data(f"saliency {name!r}", data_needs(name))
    function = _SCORES[name]
    before = _fingerprint(weight, function)
    result = function(weight, **{need: inputs[need] for need in _needs(function)})
    if _fingerprint(weight, function) != before:
        raise ValueError(f"saliency {name!r} changed the weight in place; work on a copy (abs, not abs_)")
    scored = result if isinstance(result, Scored) else Scored(result, {})
    shape = tuple(scored.scores.shape) if isinstance(scored.scores, Tensor) else type(scored.scores)
    if shape != tuple(weight.shape):
        raise ValueError(f"saliency {name!r} returned {shape} for a weight {tuple(weight.shape)}")
    return Scored(scored.scores.to(weight.device, torch.float32), scored.facts)


def _fingerprint(weight: Tensor, function: ScoreFunction) -> tuple[int, int]:
    """What differs once a score has changed the weight: torch's count of changes, a checksum of the bytes.

    The count does not see changes through `.data` or NumPy; the checksum does, and is left out for the
    scores of this file, since it reads the whole weight.
    """
    count = 0 if weight.is_inference() else weight._version
    if function.__module__ == __name__:
        return count, 0
    return count, zlib.crc32(weight.detach().cpu().contiguous().view(torch.uint8).numpy().data)


def score_needs(name: str) -> list[str]:
    """What the score called `name` asks for, of `NEEDS`.

    >>> score_needs("svd"), score_needs("awq")
    (['rank', 'seed'], ['input_norm'])
    """
    check_name(name)
    return _needs(_SCORES[name])


def data_needs(name: str) -> list[str]:
    """Those of its needs that only calibration batches can give; empty for a data-free score."""
    return [need for need in score_needs(name) if need in FROM_DATA]


def no_data(what: str, needs: list[str], instead: str = "") -> ValueError:
    """The error for a choice that needs data and has none; instead: what else can be done."""
    return ValueError(
        f"{what} needs {needs}, which only data can give: load the model dense and "
        f"call quantize_model(model, config, batches){instead}"
    )


def check_name(name: str) -> None:
    """Raise ValueError unless a score is registered as `name`."""
    if name not in _SCORES:
        raise ValueError(
            f"saliency={name!r}: must be one of {saliency_names()}, or be made known with register_saliency"
        )


def _needs(function: ScoreFunction) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]


@register_saliency("svd")
def _svd(weight: Tensor, *, rank: int, seed: int) -> Scored:
    """Absolute value of the rank-`rank` part: alignment with the principal structure."""
    structure = svd_.principal(weight, rank, seed=seed)
    return Scored(structure.matrix().abs_(), {"sigma_ratio": structure.sigma_ratio})


@register_saliency("magnitude")
def _magnitude(weight: Tensor) -> Tensor:
    return weight.abs()


@register_saliency("random")
def _random(weight: Tensor, *, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(weight.shape, generator=generator, dtype=torch.float32, device="cpu")
    return scores.to(weight.device)


@register_saliency("relative")
def _relative(weight: Tensor, *, group: int) -> Tensor:
    """abs(w) over the root mean square of its group, taken without the group's outliers."""
    out, in_features = weight.shape
    size = torch.nn.functional.pad(weight.abs(), (0, -in_features % group)).view(out, -1, group)
    real = torch.ones(in_features, dtype=torch.float32, device=weight.device)
    real = torch.nn.functional.pad(real, (0, -in_features % group)).view(1, -1, group)
    typical = _root_mean_square(size, real)
    inliers = real * (size <= OUTLIER * typical)
    typical = _root_mean_square(size, inliers)
    return (size / typical.clamp(min=torch.finfo(torch.float32).tiny)).view(out, -1)[:, :in_features]


def _root_mean_square(size: Tensor, weights: Tensor) -> Tensor:
    """Of `[out, groups, group]` over the last dimension, where `weights` is 1; scaled to be safe."""
    top = size.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    total = (weights * (size / top).square()).sum(-1, keepdim=True)
    return top * (total / weights.sum(-1, keepdim=True).clamp(min=1)).sqrt()


@register_saliency("awq")
def _awq(weight: Tensor, *, input_norm: Tensor) -> Tensor:
    """abs(W_ij) * norm(X_j): the weight's share in the output, input by input."""
    return weight.abs() * input_norm


@register_saliency("spqr")
def _spqr(weight: Tensor, *, input_gram: Tensor, tokens: int) -> Tensor:
    """W_ij^2 / [H^-1]_jj with H = 2/N X^T X, damped; its root, which orders the weights alike."""
    inverse = damped_inverse(input_gram.double() * (2 / tokens))
    return weight.abs() * inverse.diagonal().rsqrt().float()
