"""Saliency scores: how much each weight of a matrix matters. The k weights with the highest stay in FP32.

A score is one function, `weight [out, in] -> scores [out, in]`; what else it needs are its
keyword-only parameters, by name: see `NEEDS`. Sources: `svd` is arXiv 2512.01343 (abs of the rank-8
part of the weight itself); `awq` and `spqr` are the scores that paper takes from arXiv 2306.00978 and
2306.03078 (the scores only, not the methods of these names); `pqi` and `requant` are arXiv 2503.01901; the
others are baselines.
Not here: how many are kept and where (`core.topk`), and how they are stored (`format.encode`).
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
    "sensitivity": "size of the PQI of each weight: how much rounding it moves the loss, [out, in]",
    "given_back": "the same after ReQuant, and infinity for the weights that it has given back, [out, in]",
}
"""The keyword-only parameters that a score may declare."""

BY_LOSS = ("sensitivity", "given_back")
"""Those of `NEEDS` that only a loss on batches can give."""

FROM_DATA = ("input_norm", "input_gram", "tokens", *BY_LOSS)
"""Those of `NEEDS` that only batches can give."""

OUTLIER = 3.0
"""In `relative`: entries beyond this many root mean squares of their group are outliers of it."""


class Scored(NamedTuple):
    """Scores of a weight, and what was measured while computing them.

    Attributes:
        scores: `[out, in]`, the larger the more salient.
        facts: numbers for the report, by name.
    """

    scores: Tensor
    facts: dict[str, float]


ScoreFunction = Callable[..., Tensor | Scored]

_SCORES: dict[str, ScoreFunction] = {}


@checked_arguments(name='write @register_saliency("name")', replace="True or False")
def register_saliency(name: str, *, replace: bool = False) -> Callable[[ScoreFunction], ScoreFunction]:
    """Decorator that registers a function as a score, for `SVDQConfig(saliency=name)`.

    The function takes `weight` `[out, in]`, float32, and as keyword-only parameters any of `NEEDS`;
    it returns scores `[out, in]`, the larger the more salient, or a `Scored`.

    Args:
        name: of the score.
        replace: whether a score of the same name may be replaced.

    Returns:
        The decorator; it returns the function unchanged.

    Raises:
        TypeError: it was used without a name.
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
    """Scores of one weight by a registered score.

    Args:
        name: of the score.
        weight: `[out, in]`, float32.
        inputs: values for `NEEDS`, by name; the score gets those it declares.

    Returns:
        Scores `[out, in]`, float32, on the weight's device, and the score's facts.

    Raises:
        ValueError: no such score; it needs data that `inputs` lacks; it changed the weight; or what it
            returned is not one number for each weight.
    """
    check_inputs(name, inputs)
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


def check_inputs(name: str, inputs: Mapping[str, Any]) -> None:
    """Refuse to score without what a score needs.

    Args:
        name: of a registered score.
        inputs: values for `NEEDS`, by name.

    Raises:
        ValueError: no such score, or `inputs` lacks what it declares.
    """
    if any(need not in inputs for need in score_needs(name)):
        raise no_data(f"saliency {name!r}", data_needs(name))


def built_in(name: str) -> ScoreFunction | None:
    """The function of a score of this file; None where a user has registered another under its name."""
    function = _SCORES[name]
    return function if function.__module__ == __name__ else None


def _fingerprint(weight: Tensor, function: ScoreFunction) -> tuple[int, int]:
    """A pair of numbers that differs once a score has changed the weight: torch's version counter, and a CRC.

    The counter does not see changes through `.data` or NumPy; the checksum does. It reads the whole weight,
    so it is left out for the scores of this file.
    """
    count = 0 if weight.is_inference() else weight._version
    if function.__module__ == __name__:
        return count, 0
    return count, zlib.crc32(weight.detach().cpu().contiguous().view(torch.uint8).numpy().data)


def score_needs(name: str) -> list[str]:
    """The parameters of `NEEDS` that a score declares.

    Args:
        name: of a registered score.

    Raises:
        ValueError: no such score.

    >>> score_needs("svd"), score_needs("awq")
    (['rank', 'seed'], ['input_norm'])
    """
    check_name(name)
    return _needs(_SCORES[name])


def data_needs(name: str) -> list[str]:
    """The parameters of a score that only calibration batches can give; empty for a data-free score.

    Args:
        name: of a registered score.

    Raises:
        ValueError: no such score.

    >>> data_needs("svd"), data_needs("awq")
    ([], ['input_norm'])
    """
    return [need for need in score_needs(name) if need in FROM_DATA]


def no_data(what: str, needs: list[str], instead: str = "") -> ValueError:
    """The error for a choice that needs calibration data where there is none.

    Args:
        what: the choice, as the user wrote it.
        needs: the parameters of `NEEDS` that are missing.
        instead: end of the message: another way out.

    Returns:
        The error, to be raised by the caller.
    """
    return ValueError(
        f"{what} needs {needs}, which only data can give: load the model dense and "
        f"call quantize_model(model, config, batches){instead}"
    )


def check_name(name: str) -> None:
    """Refuse a name under which no score is registered.

    Args:
        name: of a score.

    Raises:
        ValueError: no score is registered as `name`.
    """
    if name not in _SCORES:
        raise ValueError(
            f"saliency={name!r}: must be one of {saliency_names()}, or be made known with register_saliency"
        )


def _needs(function: ScoreFunction) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]


@register_saliency("svd")
def _svd(weight: Tensor, *, rank: int, seed: int) -> Scored:
    """Absolute value of the rank-`rank` part: how much a weight belongs to the principal structure."""
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
    """abs(w) over the root mean square of its group, computed without the group's outliers."""
    out, in_features = weight.shape
    missing = -in_features % group
    size = torch.nn.functional.pad(weight.abs(), (0, missing)).view(out, -1, group)
    real = torch.ones(in_features, dtype=torch.float32, device=weight.device)
    real = torch.nn.functional.pad(real, (0, missing)).view(1, -1, group)
    top = size.amax(-1, keepdim=True).clamp_(min=torch.finfo(torch.float32).tiny)
    square = (size / top).square_()  # padding is zero, so it adds nothing
    typical = top * (square.sum(-1, keepdim=True) / real.sum(-1, keepdim=True)).sqrt_()
    inliers = (size <= OUTLIER * typical).float()
    inliers = inliers.mul_(real) if missing else inliers
    count = inliers.sum(-1, keepdim=True).clamp_(min=1)
    typical = top * (square.mul_(inliers).sum(-1, keepdim=True) / count).sqrt_()
    return (size / typical.clamp_(min=torch.finfo(torch.float32).tiny)).view(out, -1)[:, :in_features]


@register_saliency("awq")
def _awq(weight: Tensor, *, input_norm: Tensor) -> Tensor:
    """abs(W_ij) * norm(X_j): the contribution of a weight to the output, by the size of its input."""
    return weight.abs() * input_norm


@register_saliency("spqr")
def _spqr(weight: Tensor, *, input_gram: Tensor, tokens: int) -> Tensor:
    """abs(W_ij) / sqrt([H^-1]_jj) with H = 2/N X^T X, damped: the root of SpQR's score, in the same order."""
    inverse = damped_inverse(input_gram.double() * (2 / tokens))
    return weight.abs() * inverse.diagonal().rsqrt().float()


@register_saliency("pqi")
def _pqi(weight: Tensor, *, sensitivity: Tensor) -> Tensor:
    """How much rounding a weight moves the loss on the sequences of the batches, up or down."""
    return sensitivity


@register_saliency("requant")
def _requant(weight: Tensor, *, given_back: Tensor) -> Tensor:
    """The choice of ReQuant (`quantize.requant`), which is one for all layers together."""
    return given_back
