"""One weight of a model -> what is stored for it: checked, scored, decomposed, and measured.

It knows the config, the score and the format, no modules and no models: those are in `convert`.
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
from svdq_hf.format.checks import check_scales
from svdq_hf.format.encode import encode, relative_error
from svdq_hf.format.parts import PartSpec, part_specs, stack_specs
from svdq_hf.quantize.expert_stream import LazyStack, Pieces
from svdq_hf.quantize.prepared import Prepared, choose, score

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
    """Quantize one weight: its stored parts, and the facts measured.

    Facts: `relative_error`, the Frobenius norm of what was lost over that of the weight; and what
    the score measured (`sigma_ratio` for "svd": sigma_r+1 / sigma_r, near 1 = ill determined).

    Of a weight on the meta device the parts have shapes and no data, and nothing is measured: so a model can
    be planned (`streaming.plan`).

    Args:
        weight: `[out, in]`.
        config: of the whole model.
        name: of the layer, for its k and for errors.
        inputs: what the layer saw, for scores and error feedback that need data.
        scored: its scores by `score_weight`, where they are known already.

    Raises:
        ValueError: a NaN or an infinity, a dtype that is not a plain float, or a score's own refusal;
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
    """The scores `[out, in]` of one weight, for who quantizes it more than once (see `quantize_weight`).

    Raises:
        ValueError: see `quantize_weight`.
    """
    with _prepared(weight, config, name, inputs) as prepared:
        return score(prepared)


def errors_at(
    weight: Tensor, config: SVDQConfig, name: str, ks: Iterable[int], inputs: InputStatistics | None = None
) -> dict[int, float]:
    """The relative error of the layer `name` with each number of salient weights, scored once.

    It is that of rounding without error feedback.

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
        check_scales(parts)  # or it would be refused when it is loaded
    except ValueError as error:
        top = float(prepared.dense.abs().max())
        raise ValueError(f"{error}: its largest weight is {top:.3g}; {_KEEP_DENSE}") from error
    return parts, relative_error(prepared.dense, parts, prepared.config.scheme)


@contextmanager
def _prepared(
    weight: Tensor, config: SVDQConfig, name: str, inputs: InputStatistics | None
) -> Iterator[Prepared]:
    """A weight that can be quantized, ready for it; errors in the block say of which layer."""
    check_weight(name, weight)
    with _errors_name_the_layer(name, weight):
        yield Prepared(weight, config, inputs)


@contextmanager
def _errors_name_the_layer(name: str, weight: Tensor) -> Iterator[None]:
    """What is stored must not depend on autocast; and an error, a user's score's too, says of which layer."""
    try:
        with torch.autocast(weight.device.type, enabled=False):
            yield
    except Exception as error:
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"could not quantize {name}: {kind}{error}") from error


def check_weight(name: str, weight: Tensor) -> None:
    """Refuse a weight that cannot be quantized: no plain float, empty, without data, a NaN, or out of range."""
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
    low, high = map(float, weight.detach().aminmax()) if weight.numel() else (0.0, 0.0)
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
    """Refuse a weight that is no plain float (a layer of fp8 or int8 has scales of its own)."""
    if dtype not in SOURCE_DTYPES:
        allowed = [str(source) for source in SOURCE_DTYPES]
        raise ValueError(f"could not quantize {name}: weight is {dtype}; it must be one of {allowed}")


def quantize_stack(
    weights: Tensor | Pieces | LazyStack, config: SVDQConfig, name: str, *, transposed: bool = False
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Quantize `weights` `[experts, out, in]`, one expert after the other: stacked parts, and the facts.

    transposed: they are `[experts, in, out]`. Beside the parts, memory is that of one expert's work. The
    relative error is that of all experts together, other facts are means.

    Raises:
        ValueError: see `quantize_weight`; it names the expert too.
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
    """The Frobenius norm, in units in which no square overflows."""
    top = max(-float(weight.min()), float(weight.max())) or 1.0
    return top * float(torch.linalg.vector_norm(weight.float() / top))


def _together(facts: list[dict[str, float]], sizes: list[float]) -> dict[str, float]:
    """One set of facts for many weights, of these Frobenius norms."""
    mean = {name: sum(found[name] for found in facts) / len(facts) for name in (facts[0] if facts else {})}
    lost = math.hypot(*(found["relative_error"] * size for found, size in zip(facts, sizes, strict=True)))
    total = math.hypot(*sizes)
    return {**mean, "relative_error": lost / total if total else 0.0}
