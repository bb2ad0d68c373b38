"""A weight and what a config asks of it: in float32, its column scale, what its score is given and sees.

Everybody who scores or rounds a weight does it through this. Not here: checks and names (`weight`).
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
    """A weight `[out, in]` that a config is to quantize.

    Args:
        weight: `[out, in]`, of any float dtype.
        config: of this layer (`SVDQConfig.of_layer`).
        inputs: what the layer saw, for scores and error feedback that need data.
    """

    def __init__(self, weight: Tensor, config: SVDQConfig, inputs: InputStatistics | None = None) -> None:
        gram = inputs.gram if inputs is not None and config.error_feedback else None
        dense = weight.float().contiguous()
        super().__init__(dense, config.scheme.grid, gram, config.extra_damping if gram is not None else 0.0)
        self.config = config
        self.inputs = inputs

    @property
    def seen(self) -> Tensor:
        """The weight that a score sees, `[out, in]`: without its column scale; itself for awq, spqr.

        Those weigh each input by its own size already, which a column scale would take away.
        """
        return self.dense if saliency.data_needs(self.config.saliency) else self.normalized

    @property
    def known(self) -> dict[str, Any]:
        """What a score may ask for (`saliency.NEEDS`), as far as it is known."""
        config, group = self.config, self.grid.columns(self.dense.shape[1])
        known: dict[str, Any] = {"rank": config.rank, "seed": config.seed, "group": group}
        if self.inputs is not None:
            known |= {"input_norm": self.inputs.norm, "tokens": self.inputs.tokens}
            if self.inputs.gram is not None:
                known["input_gram"] = self.inputs.gram
        return known


def score(prepared: Prepared) -> Scored:
    """The scores `[out, in]` by the config's score, and what it measured.

    Raises:
        ValueError: see `saliency.score`.
    """
    return saliency.score(prepared.config.saliency, prepared.seen, prepared.known)


def choose(prepared: Prepared, scored: Scored | None = None) -> tuple[Tensor, Tensor, dict[str, float]]:
    """The rows and columns `[k]` of the salient entries, int32, and what the score measured.

    scored: its `score`, where that is known already; else it is found, and let go.
    """
    k = salient_count(prepared.config.k, *prepared.dense.shape)
    if k == 0:
        nowhere = prepared.dense.new_empty(0).int()
        return nowhere, nowhere, {}
    scores, facts = scored or score(prepared)
    return *top_positions(scores, k), facts
