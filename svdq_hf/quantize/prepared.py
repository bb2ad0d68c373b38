"""A weight prepared for a config: in float32, with its column scale and the values its score may ask for.

Whoever scores or rounds a weight does it through this. Not here: checks, and names in errors
(`quantize.weight`).
"""

from typing import Any

from torch import Tensor

from svdq_hf.calibration.inputs import InputStatistics
from svdq_hf.config import SVDQConfig
from svdq_hf.core import saliency
from svdq_hf.core.normalized import NormalizedWeight
from svdq_hf.core.saliency import Scored
from svdq_hf.core.topk import salient_count, top_positions


class Prepared(NormalizedWeight):
    """A weight `[out, in]` together with the config that it is quantized by.

    Args:
        weight: `[out, in]`, of any float dtype.
        config: of this layer (`SVDQConfig.of_layer`).
        inputs: statistics of the layer's inputs, for scores and error feedback that need data.
    """

    def __init__(self, weight: Tensor, config: SVDQConfig, inputs: InputStatistics | None = None) -> None:
        gram = inputs.gram if inputs is not None and config.error_feedback else None
        dense = weight.float().contiguous()
        super().__init__(dense, config.scheme.grid, gram, config.extra_damping if gram is not None else 0.0)
        self.config = config
        self.inputs = inputs

    @property
    def seen(self) -> Tensor:
        """The matrix `[out, in]`, float32, that is given to the saliency score.

        Data-free scores get the weight divided by its column scale: the matrix that is really rounded. Scores
        from data (awq, spqr) get the weight itself: they weigh each column by the size of its input already.
        """
        return self.dense if saliency.data_needs(self.config.saliency) else self.normalized

    @property
    def known(self) -> dict[str, Any]:
        """Values for `saliency.NEEDS`, as far as they are known."""
        config, group = self.config, self.grid.columns(self.dense.shape[1])
        known: dict[str, Any] = {"rank": config.rank, "seed": config.seed, "group": group}
        if self.inputs is not None:
            known |= {"input_norm": self.inputs.norm, "tokens": self.inputs.tokens}
            found = {"input_gram": self.inputs.gram, "sensitivity": self.inputs.sensitivity}
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
    return saliency.score(prepared.config.saliency, prepared.seen, prepared.known)


def choose(prepared: Prepared, scored: Scored | None = None) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Positions of the salient entries of a prepared weight.

    Args:
        prepared: a weight `[out, in]`; k is its config's.
        scored: the result of `score`, where it is known already.

    Returns:
        Rows `[k]` and columns `[k]`, int32, sorted by row, then by column; and the score's facts.

    Raises:
        ValueError: see `score`.
    """
    k = salient_count(prepared.config.k, *prepared.dense.shape)
    if k == 0:
        nowhere = prepared.dense.new_empty(0).int()
        return nowhere, nowhere, {}
    scores, facts = scored or score(prepared)
    return *top_positions(scores, k), facts
