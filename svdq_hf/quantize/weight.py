"""One weight of a model -> what is stored for it: checked, scored, decomposed, and measured.

It knows the config, the score and the format, no modules and no models: those are in `convert`.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from svdq_hf.calibration.inputs import InputStatistics
from svdq_hf.config import SVDQConfig
from svdq_hf.core.column_scale import column_scale
from svdq_hf.core.error_feedback import damped
from svdq_hf.core.saliency import data_needs, score
from svdq_hf.core.topk import salient_count, top_positions
from svdq_hf.format.checks import check_range
from svdq_hf.format.encode import decompose, relative_error
from svdq_hf.format.parts import PartSpec, part_specs, stack_specs
from svdq_hf.quantize.expert_stream import LazyStack, Pieces

SMALLEST_TOP = 2.0**-110
"""Least size of a matrix's largest weight. Its row's scale, `top / 8 / 127`, is then 2**6 times the smallest
normal bfloat16, 2**-126: below that a scale loses digits, and then it is zero."""

LARGEST_TOP = 2.0**123
"""Most that a weight may be: 2**5 below the end of float32, since level times row's times column's scale is
more than the weight where these are not of one row and column."""

SOURCE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def quantize_weight(
    weight: Tensor, config: SVDQConfig, name: str, inputs: InputStatistics | None = None
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Quantize `weight` `[out, in]` of the layer `name`: its stored parts, and the facts measured.

    inputs: what the layer saw, for the scores that need data.

    Facts: `relative_error`, the Frobenius norm of what was lost over that of the weight; and what
    the score measured (`sigma_ratio` for "svd": sigma_r+1 / sigma_r, near 1 = ill determined).

    Of a weight on the meta device the parts have shapes and no data, and nothing is measured: so a model can
    be planned (`streaming.plan`).

    Raises:
        ValueError: a NaN or an infinity, a dtype that is not a plain float, or a score's own refusal;
            it names the layer.
    """
    if weight.is_meta:
        check_source_dtype(name, weight.dtype)
        out, in_features = weight.shape
        return _empty(part_specs(out, in_features, config.of_layer(name).scheme), weight.device), {}
    check_weight(name, weight)
    with _errors_name_the_layer(name, weight):
        return _quantize(weight.float().contiguous(), config.of_layer(name), inputs)


def errors_at(
    weight: Tensor, config: SVDQConfig, name: str, ks: Iterable[int], inputs: InputStatistics | None = None
) -> dict[int, float]:
    """The relative error of the layer `name` with each number of salient weights, scored once.

    Raises:
        ValueError: see `quantize_weight`.
    """
    check_weight(name, weight)
    with _errors_name_the_layer(name, weight):
        dense = weight.float().contiguous()
        per_column = column_scale(dense) if config.scheme.grid.column_scale else None
        scores, _ = _scores(dense, config, inputs, per_column)
        return {
            k: quantize_chosen(dense, config, *top_positions(scores, k), per_column)[1]["relative_error"]
            for k in ks
        }


@contextmanager
def _errors_name_the_layer(name: str, weight: Tensor) -> Iterator[None]:
    """What is stored must not depend on autocast; and an error, a user's score's too, says of which layer."""
    try:
        with torch.autocast(weight.device.type, enabled=False):
            yield
    except Exception as error:
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"could not quantize {name}: {kind}{error}") from error


def _quantize(
    dense: Tensor, config: SVDQConfig, inputs: InputStatistics | None
) -> tuple[dict[str, Tensor], dict[str, float]]:
    per_column = column_scale(dense) if config.scheme.grid.column_scale else None
    rows, columns, facts = _choose(dense, config, inputs, per_column)
    gram = inputs.gram if inputs is not None and config.error_feedback else None
    if gram is not None and config.extra_damping:
        gram = damped(gram, per_column, config.extra_damping)
    parts, errors = quantize_chosen(dense, config, rows, columns, per_column, gram)
    return parts, errors | facts


def check_weight(name: str, weight: Tensor) -> None:
    """Refuse a weight that cannot be quantized: no plain float, without data, a NaN, or out of range."""
    check_source_dtype(name, weight.dtype)
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


def quantize_chosen(
    weight: Tensor,
    config: SVDQConfig,
    rows: Tensor,
    columns: Tensor,
    per_column: Tensor | None = None,
    gram: Tensor | None = None,
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Quantize `weight` `[out, in]`, float32, with the entries at `rows`, `columns` `[k]` kept exactly."""
    parts = decompose(weight, rows, columns, config.scheme, per_column, gram)
    try:
        check_range(parts)  # or it would be refused when it is loaded
    except ValueError as error:
        top = float(weight.abs().max())
        raise ValueError(f"{error}: its largest weight is {top:.3g}; {_KEEP_DENSE}") from error
    return parts, {"relative_error": relative_error(weight, parts, config.scheme)}


def weight_for_score(weight: Tensor, config: SVDQConfig, per_column: Tensor | None) -> Tensor:
    """The weight that a score sees: as the grid sees it, without its column scale; itself for awq, spqr.

    Those weigh each input by its own size already, which a column scale would take away.
    """
    return weight if per_column is None or data_needs(config.saliency) else weight / per_column.float()


def _choose(
    weight: Tensor, config: SVDQConfig, inputs: InputStatistics | None, per_column: Tensor | None
) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Rows and columns of the salient entries, and what the score measured; scores are let go at once."""
    k = salient_count(config.k, *weight.shape)
    if k == 0:
        nowhere = torch.empty(0, dtype=torch.int32, device=weight.device)
        return nowhere, nowhere, {}
    scores, facts = _scores(weight, config, inputs, per_column)
    return *top_positions(scores, k), facts


def _scores(
    weight: Tensor, config: SVDQConfig, inputs: InputStatistics | None, per_column: Tensor | None
) -> tuple[Tensor, dict[str, float]]:
    seen = weight_for_score(weight, config, per_column)
    return score(config.saliency, seen, score_inputs(config, weight.shape[1], inputs))


def check_source_dtype(name: str, dtype: torch.dtype | str) -> None:
    """Refuse a weight that is no plain float (a layer of fp8 or int8 has scales of its own)."""
    if dtype not in SOURCE_DTYPES:
        allowed = [str(source) for source in SOURCE_DTYPES]
        raise ValueError(f"could not quantize {name}: weight is {dtype}; it must be one of {allowed}")


def score_inputs(
    config: SVDQConfig, in_features: int, inputs: InputStatistics | None = None
) -> dict[str, Any]:
    """What a score may ask for (`saliency.NEEDS`), as far as it is known for a layer."""
    group = config.scheme.grid.columns(in_features)
    known: dict[str, Any] = {"rank": config.rank, "seed": config.seed, "group": group}
    if inputs is not None:
        known |= {"input_norm": inputs.norm, "tokens": inputs.tokens}
        if inputs.gram is not None:
            known["input_gram"] = inputs.gram
    return known


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
