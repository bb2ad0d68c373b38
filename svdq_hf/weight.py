"""One weight of a model -> what is stored for it: checked, scored, decomposed, and measured.

It knows the config, the score and the format, no modules and no models: those are in `convert`.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from svdq_hf.calibration import InputStatistics
from svdq_hf.column_scale import column_scale
from svdq_hf.config import SVDQConfig
from svdq_hf.decompose import decompose, relative_error
from svdq_hf.feedback import trusted_less
from svdq_hf.saliency import data_needs, score
from svdq_hf.sparse import salient_count, top_positions

SOURCE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def quantize_weight(
    weight: Tensor, config: SVDQConfig, name: str, inputs: InputStatistics | None = None
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Quantize `weight` `[out, in]` of the layer `name`: its stored parts, and the facts measured.

    inputs: what the layer saw, for the scores that need data.

    Facts: `relative_error`, the Frobenius norm of what was lost over that of the weight; and what
    the score measured (`sigma_ratio` for "svd": sigma_r+1 / sigma_r, near 1 = ill determined).

    Raises:
        ValueError: a NaN or an infinity, a dtype that is not a plain float, or a score's own refusal;
            it names the layer.
    """
    check_weight(name, weight)
    with _told_of(name, weight):
        return _quantize(weight.float().contiguous(), config.of_layer(name), inputs)


def errors_at(
    weight: Tensor, config: SVDQConfig, name: str, ks: Iterable[int], inputs: InputStatistics | None = None
) -> dict[int, float]:
    """The relative error of the layer `name` with each number of salient weights, scored once.

    Raises:
        ValueError: see `quantize_weight`.
    """
    check_weight(name, weight)
    with _told_of(name, weight):
        dense = weight.float().contiguous()
        per_column = column_scale(dense) if config.scheme.grid.column_scale else None
        scores, _ = _scores(dense, config, inputs, per_column)
        return {
            k: quantize_chosen(dense, config, *top_positions(scores, k), per_column)[1]["relative_error"]
            for k in ks
        }


@contextmanager
def _told_of(name: str, weight: Tensor) -> Iterator[None]:
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
    if gram is not None and config.synthetic:
        gram = trusted_less(gram, per_column)
    parts, errors = quantize_chosen(dense, config, rows, columns, per_column, gram)
    return parts, errors | facts


def check_weight(name: str, weight: Tensor) -> None:
    """Refuse a weight that cannot be quantized: no plain float, without data, a NaN or an infinity."""
    check_source_dtype(name, weight.dtype)
    if hasattr(weight, "full_tensor"):  # a DTensor
        raise ValueError(f"{name}: weight is a slice of a sharded model's; quantize it before it is sharded")
    if weight.is_meta:
        raise ValueError(f"{name}: weight is on the meta device, without data; load the model first")
    if not torch.isfinite(weight).all():
        raise ValueError(
            f"could not quantize {name}: weight has a NaN or an infinity: the checkpoint is damaged"
        )


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
    return parts, {"relative_error": relative_error(weight, parts, config.scheme)}


def as_scored(weight: Tensor, config: SVDQConfig, per_column: Tensor | None) -> Tensor:
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
    seen = as_scored(weight, config, per_column)
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
