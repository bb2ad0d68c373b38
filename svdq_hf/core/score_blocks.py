"""Scores block by block of rows, so that those of a large weight are never all in memory.

For the built-in scores that look at each row, or at each group, by itself; and for "svd", of which only the
principal structure needs the whole weight. Not here: the scores themselves (`core.saliency`), and which of
them are the highest (`core.topk`).
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from svdq_hf.core import saliency, svd
from svdq_hf.core.normalized import NormalizedWeight
from svdq_hf.core.rounding import row_blocks

BY_ROWS = ("magnitude", "relative", "awq")
"""Scores of which those of some rows depend on these rows alone."""


class ScoreBlocks(NamedTuple):
    """The scores of a weight `[out, in]`, computed when they are asked for.

    Attributes:
        rows: gives the scores `[rows, in]`, float32, of some rows.
        facts: numbers for the report, by name.
    """

    rows: Callable[[slice], Tensor]
    facts: dict[str, float]

    def of(self, out: int, in_features: int) -> Iterator[tuple[slice, Tensor]]:
        """Rows from the first to the last, and their scores `[rows, in]`.

        Args:
            out: rows of the weight.
            in_features: its columns.
        """
        for rows in row_blocks(out, in_features):
            yield rows, self.rows(rows)


def score_blocks(name: str, weight: NormalizedWeight, inputs: Mapping[str, Any]) -> ScoreBlocks | None:
    """Scores of a weight by blocks of rows; None for a score that must see the whole weight.

    Args:
        name: of a registered score.
        weight: `[out, in]`; scores from data look at it as it is, others at what is left when its column
            scale has been taken out.
        inputs: values for `saliency.NEEDS`, by name.

    Raises:
        ValueError: no such score, or it needs data that `inputs` lacks.
    """
    saliency.check_inputs(name, inputs)
    function = saliency.built_in(name)
    if function is None or not weight.dense.is_cpu:
        return None
    if name == "svd":
        return _of_svd(weight, inputs["rank"], inputs["seed"])
    if name not in BY_ROWS:
        return None
    needs = {need: inputs[need] for need in saliency.score_needs(name)}
    raw = bool(saliency.data_needs(name))

    def scores(rows: slice) -> Tensor:
        found = function(weight.dense[rows].float() if raw else weight.rows(rows), **needs)
        return found if isinstance(found, Tensor) else found.scores

    return ScoreBlocks(scores, {})


def _of_svd(weight: NormalizedWeight, rank: int, seed: int) -> ScoreBlocks:
    """The sizes of the rank-`rank` part, a product of two thin matrices."""
    found = svd.principal(weight.dense, rank, seed=seed, column_scale=weight.column_scale)
    left, right = found.u * found.s, found.v.T.contiguous()
    return ScoreBlocks(lambda rows: (left[rows] @ right).abs_(), {"sigma_ratio": found.sigma_ratio})
