"""A weight prepared for a config: in float32, with its column scale and the values its score may ask for.

Whoever scores or rounds a weight does it through this. Not here: checks, and names in errors
(`quantize.weight`).
"""

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from svdq_hf.calibration.inputs import InputStatistics
from svdq_hf.config import SVDQConfig
from svdq_hf.core import saliency
from svdq_hf.core.normalized import NormalizedWeight
from svdq_hf.core.saliency import Scored
from svdq_hf.core.score_blocks import score_blocks
from svdq_hf.core.topk import salient_count, top_of_blocks, top_positions
from svdq_hf.quantize.encoding import FLOATS, column_scale, largest


class Prepared(NormalizedWeight):
    """A weight `[out, in]` together with the config that it is quantized by.

    Args:
        weight: `[out, in]`, of any float dtype.
        config: of this layer (`SVDQConfig.of_layer`).
        inputs: statistics of the layer's inputs, for scores and error feedback that need data.
    """

    def __init__(self, weight: Tensor, config: SVDQConfig, inputs: InputStatistics | None = None) -> None:
        gram = inputs.gram if inputs is not None and config.error_feedback else None
        dense = (weight if weight.dtype in FLOATS else weight.float()).contiguous()
        super().__init__(dense, config.scheme.grid, gram, config.extra_damping if gram is not None else 0.0)
        self.config = config
        self.inputs = inputs

    @cached_property
    def top(self) -> float:
        """The largest size of a weight."""
        return largest(self.dense)

    @cached_property
    def column_scale(self) -> Tensor | None:
        """The scale of each column, `[in]`, bfloat16; None where the grid has none."""
        return column_scale(self.dense, self.top) if self.grid.column_scale else None

    @property
    def seen(self) -> Tensor:
        """The matrix `[out, in]`, float32, that is given to the saliency score.

        Data-free scores get the weight divided by its column scale: the matrix that is really rounded. Scores
        from data (awq, spqr, pqi, requant) get the weight itself: they know inputs or the loss already.
        """
        return self.dense.float() if saliency.data_needs(self.config.saliency) else self.normalized

    @property
    def known(self) -> dict[str, Any]:
        """Values for `saliency.NEEDS`, as far as they are known."""
        config, group = self.config, self.grid.columns(self.dense.shape[1])
        known: dict[str, Any] = {"rank": config.rank, "seed": config.seed, "group": group}
        if self.inputs is not None:
            known |= {"input_norm": self.inputs.norm, "tokens": self.inputs.tokens}
            found = dict.fromkeys(saliency.BY_LOSS, self.inputs.sensitivity)
            found |= {"input_gram": self.inputs.gram}
            known |= {name: value for name, value in found.items() if value is not None}
        return known


def score(prepared: Prepared) -> Scored:
    """Scores of a prepared weight by its config's score.

    Args:
        prepared: a weight `[out, in]`.

    Returns:
        Scores `[out, in]`, float32, and the score's facts.

    Raises:
        ValueError: see `saliency.score`.
    """
    name, (out, in_features) = prepared.config.saliency, prepared.dense.shape
    blocks = score_blocks(name, prepared, prepared.known)
    if blocks is None:
        return saliency.score(name, prepared.seen, prepared.known)
    scores = prepared.dense.new_empty(out, in_features, dtype=torch.float32)
    for rows, block in blocks.of(out, in_features):
        scores[rows] = block
    return Scored(scores, blocks.facts)


def choose(prepared: Prepared, scored: Scored | None = None) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Positions of the salient entries of a prepared weight.

    Args:
        prepared: a weight `[out, in]`; k is its config's.
        scored: the result of `score`, where it is known already. Otherwise scores are computed block by
            block, where their function can do that, and not kept.

    Returns:
        Rows `[k]` and columns `[k]`, int32, sorted by row, then by column; and the score's facts.

    Raises:
        ValueError: see `score`.
    """
    out, in_features = prepared.dense.shape
    k = salient_count(prepared.config.k, out, in_features)
    if k == 0:
        nowhere = prepared.dense.new_empty(0, dtype=torch.int32)
        return nowhere, nowhere, {}
    blocks = None if scored else score_blocks(prepared.config.saliency, prepared, prepared.known)
    if blocks is not None:
        return *top_of_blocks(blocks.of(out, in_features), in_features, k), blocks.facts
    scores, facts = scored or score(prepared)
    return *top_positions(scores, k), facts
