"""Quantization of one weight: checked, scored, decomposed and measured.

It knows the config, the score and the format, but no modules and no models: those are in `quantize.layer` and
`quantize.convert`.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from svdq_hf.calibration.inputs import InputStatistics
from svdq_hf.config import SVDQConfig
from svdq_hf.core.saliency import Scored
from svdq_hf.core.topk import top_positions
from svdq_hf.format.checks import check_range
from svdq_hf.format.encode import encode, relative_error
from svdq_hf.format.parts import PartSpec, part_specs, stack_specs
from svdq_hf.quantize.expert_stream import LazyStack, Pieces
from svdq_hf.quantize.prepared import Prepared, choose, score
from svdq_hf.quantize.threads import threads_for

SMALLEST_TOP = 2.0**-110
"""Least size of a matrix's largest weight. Its row's scale, `top / 8 / 127`, is then 2**6 times the smallest
normal bfloat16, 2**-126: below that a scale loses digits, and then it is zero."""

LARGEST_TOP = 2.0**123
"""Most that a weight may be: 2**5 below the end of float32, since level times row's times column's scale is
more than the weight where these are not of one row and column."""

SOURCE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def quantize_weight(
    weight: Tensor,
    config: SVDQConfig,
    name: str,
    inputs: InputStatistics | None = None,
    scored: Scored | None = None,
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Quantize one weight.

    A weight on the meta device gives parts that have shapes and no data, and no facts: so a whole model can
    be planned without being read (`checkpoint.streaming`).

    Args:
        weight: `[out, in]`, of a plain float dtype.
        config: of the whole model.
        name: of the layer, for its k and for errors.
        inputs: statistics of the layer's inputs, for scores and error feedback that need data.
        scored: the result of `score_weight`, where it is known already.

    Returns:
        The stored parts by name (see `part_specs`), and the facts measured: `relative_error`, the Frobenius
        norm of the error over that of the weight; and those of the score (`sigma_ratio` of "svd":
        sigma_r+1 / sigma_r, near 1 = ill determined).

    Raises:
        ValueError: a NaN or an infinity, a dtype that is not a plain float, or an error of the score;
            it names the layer.
    """
    if weight.is_meta:
        check_source_dtype(name, weight.dtype)
        out, in_features = weight.shape
        return _empty(part_specs(out, in_features, config.of_layer(name).scheme), weight.device), {}
    with _prepared(weight, config.of_layer(name), name, inputs) as prepared:
        rows, columns, facts = choose(prepared, scored)
        parts, error = _encoded(prepared, rows, columns)
        return parts, {"relative_error": error} | facts


def score_weight(
    weight: Tensor, config: SVDQConfig, name: str, inputs: InputStatistics | None = None
) -> Scored:
    """Scores of one weight, for callers that quantize it more than once.

    Args:
        weight: `[out, in]`, of a plain float dtype.
        config: names the score, and the column scale that is taken out before.
        name: of the layer, for errors.
        inputs: statistics of the layer's inputs, for scores that need data.

    Returns:
        Scores `[out, in]`, float32, and the score's facts.

    Raises:
        ValueError: see `quantize_weight`.
    """
    with _prepared(weight, config, name, inputs) as prepared:
        return score(prepared)


def errors_at(
    weight: Tensor, config: SVDQConfig, name: str, ks: Iterable[int], inputs: InputStatistics | None = None
) -> dict[int, float]:
    """The relative error of one weight at several numbers of salient weights, scored once.

    Rounding is measured without error feedback.

    Args:
        weight: `[out, in]`, of a plain float dtype.
        config: of the model; its `k` is not used.
        name: of the layer, for errors.
        ks: the numbers of salient weights.
        inputs: statistics of the layer's inputs, for scores that need data.

    Returns:
        The relative error by k.

    Raises:
        ValueError: see `quantize_weight`.
    """
    with _prepared(weight, config, name, inputs) as prepared:
        prepared.input_gram = None
        scores, _ = score(prepared)
        return {k: _encoded(prepared, *top_positions(scores, k))[1] for k in ks}


def _encoded(prepared: Prepared, rows: Tensor, columns: Tensor) -> tuple[dict[str, Tensor], float]:
    """The stored parts, and the relative error."""
    parts = encode(prepared, rows, columns)
    try:
        check_range(parts)  # or it would be refused when it is loaded
    except ValueError as error:
        top = float(prepared.dense.abs().max())
        raise ValueError(f"{error}: its largest weight is {top:.3g}; {_KEEP_DENSE}") from error
    return parts, relative_error(prepared.dense, parts, prepared.config.scheme)


@contextmanager
def _prepared(
    weight: Tensor, config: SVDQConfig, name: str, inputs: InputStatistics | None
) -> Iterator[Prepared]:
    """Context manager: a checked weight, ready to be quantized; errors in the block name the layer."""
    check_weight(name, weight)
    with _errors_name_the_layer(name, weight), threads_for(weight.numel()):
        yield Prepared(weight, config, inputs)


@contextmanager
def _errors_name_the_layer(name: str, weight: Tensor) -> Iterator[None]:
    """Context manager around the quantization of one layer.

    Switches autocast off, since the result must not depend on it. Raises any exception again, also one of a
    user's score function, as ValueError("could not quantize <layer>: ...").
    """
    try:
        with torch.autocast(weight.device.type, enabled=False):
            yield
    except Exception as error:
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"could not quantize {name}: {kind}{error}") from error


def check_weight(name: str, weight: Tensor) -> None:
    """Refuse a weight that cannot be quantized.

    Args:
        name: of the layer, for errors.
        weight: what should be `[out, in]`.

    Raises:
        ValueError: no plain float, not a matrix, empty, part of a sharded model, without data, a NaN or an
            infinity, or weights that scales of 16 bits cannot represent; it names the layer and the remedy.
    """
    check_source_dtype(name, weight.dtype)
    if weight.ndim != 2 or weight.numel() == 0:
        raise ValueError(
            f"could not quantize {name}: its weight has the shape {tuple(weight.shape)}, which must be [out, "
            f"in] and not empty; keep it dense with modules_to_not_convert=[{name!r}]"
        )
    if hasattr(weight, "full_tensor"):  # a DTensor
        raise ValueError(f"{name}: weight is a slice of a sharded model's; quantize it before it is sharded")
    if weight.is_meta:
        raise ValueError(f"{name}: weight is on the meta device, without data; load the model first")
    low, high = map(float, weight.detach().aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(
            f"could not quantize {name}: weight has a NaN or an infinity: the checkpoint is damaged"
        )
    top = max(-low, high)
    if top and not SMALLEST_TOP <= top <= LARGEST_TOP:
        raise ValueError(
            f"could not quantize {name}: its largest weight is {top:.3g}, and scales of 16 bits hold those "
            f"from {SMALLEST_TOP:.1g} to {LARGEST_TOP:.1g}: the checkpoint is damaged, or {_KEEP_DENSE}"
        )


_KEEP_DENSE = "keep this layer dense with modules_to_not_convert"


def check_source_dtype(name: str, dtype: torch.dtype | str) -> None:
    """Refuse a dtype that is no plain float: a layer in fp8 or int8 has scales that are not known here.

    Args:
        name: of the layer, for errors.
        dtype: of its weight; text where it stands in a file's header.

    Raises:
        ValueError: it names the layer, the dtype and the allowed ones.
    """
    if dtype not in SOURCE_DTYPES:
        allowed = [str(source) for source in SOURCE_DTYPES]
        raise ValueError(f"could not quantize {name}: weight is {dtype}; it must be one of {allowed}")


def quantize_stack(
    weights: Tensor | Pieces | LazyStack, config: SVDQConfig, name: str, *, transposed: bool = False
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Quantize the experts of a layer, one after the other.

    Beside the stacked parts, memory is that of the work on one expert.

    Args:
        weights: `[experts, out, in]`, a tensor or a stream of matrices.
        config: of the whole model.
        name: of the stack, for errors.
        transposed: whether `weights` is `[experts, in, out]`.

    Returns:
        The stored parts, stacked (see `stack_specs`), and the facts: the relative error of all experts
        together, and means of the others.

    Raises:
        ValueError: see `quantize_weight`; it names the expert, too.
    """
    experts, *shape = weights.shape
    out, in_features = reversed(shape) if transposed else shape
    specs = stack_specs(experts, out, in_features, config.scheme)
    stacks = _empty(specs, weights.device)
    if weights.device.type == "meta":
        return stacks, {}
    facts: list[dict[str, float]] = []
    sizes: list[float] = []
    for expert, weight in enumerate(weights):
        one = weight.T if transposed else weight
        if one.shape != (out, in_features):
            raise ValueError(
                f"could not quantize {name}, expert {expert}: its weight is {list(one.shape)}, of the others "
                f"{[out, in_features]}: the checkpoint is damaged"
            )
        parts, found = quantize_weight(one, config, f"{name}, expert {expert}")
        for part, stack in stacks.items():
            stack[expert] = parts[part]
        facts.append(found)
        sizes.append(_norm(weight))
    return stacks, _together(facts, sizes)


def _empty(specs: dict[str, PartSpec], device: torch.device) -> dict[str, Tensor]:
    return {part: torch.empty(spec.shape, dtype=spec.dtype, device=device) for part, spec in specs.items()}


def _norm(weight: Tensor) -> float:
    """The Frobenius norm of a matrix, computed in units in which no square overflows."""
    top = max(-float(weight.min()), float(weight.max())) or 1.0
    return top * float(torch.linalg.vector_norm(weight.float() / top))


def _together(facts: list[dict[str, float]], sizes: list[float]) -> dict[str, float]:
    """The facts of several weights as one set; `sizes` are their Frobenius norms."""
    mean = {name: sum(found[name] for found in facts) / len(facts) for name in (facts[0] if facts else {})}
    lost = math.hypot(*(found["relative_error"] * size for found, size in zip(facts, sizes, strict=True)))
    total = math.hypot(*sizes)
    return {**mean, "relative_error": lost / total if total else 0.0}
