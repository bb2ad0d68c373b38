"""A weight as its grid sees it: the scale of each column found, and taken out of weight and Gram matrix.

The one place where a column scale is found for a weight; scoring, rounding and error feedback take it from
here. Not here: what a config asks for (`quantize.prepared`), and what is stored (`format.encode`).
"""

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from svdq_hf.core.column_scale import column_scale
from svdq_hf.core.error_feedback import damped
from svdq_hf.core.grid import Grid


@dataclass(eq=False)
class NormalizedWeight:
    """A weight `[out, in]`, float32, that a grid is to round.

    Args:
        dense: the weight itself, `[out, in]`, float32; never changed here.
        grid: what it is rounded on.
        input_gram: `X^T X` `[in, in]` of its inputs, where rounding is to have error feedback.
        extra_damping: share of the Gram matrix's mean diagonal that is added to it.

    >>> import torch
    >>> weight = NormalizedWeight(torch.tensor([[1.0, 4.0], [2.0, 8.0]]), Grid(column_scale=True))
    >>> weight.column_scale.tolist(), weight.normalized.tolist()
    ([0.5, 2.0], [[2.0, 2.0], [4.0, 4.0]])
    """

    dense: Tensor
    grid: Grid
    input_gram: Tensor | None = None
    extra_damping: float = 0.0

    @cached_property
    def column_scale(self) -> Tensor | None:
        """`[in]`, bfloat16; None where the grid has none."""
        return column_scale(self.dense) if self.grid.column_scale else None

    @property
    def normalized(self) -> Tensor:
        """`dense / column_scale` `[out, in]`, made anew each time: kept, it would be one more dense copy."""
        return self.dense if self.column_scale is None else self.dense / self.column_scale.float()

    def without(self, rows: Tensor, columns: Tensor) -> Tensor:
        """A copy of `normalized` with zeros at the positions `[k]`, `[k]`."""
        rest = self.dense.clone() if self.column_scale is None else self.normalized
        rest[rows.long(), columns.long()] = 0
        return rest

    @cached_property
    def gram(self) -> Tensor | None:
        """The Gram matrix `[in, in]` of the inputs of `normalized`; None without error feedback."""
        gram = self.input_gram
        if gram is not None and self.extra_damping:
            gram = damped(gram, self.column_scale, self.extra_damping)
        if gram is None or self.column_scale is None:
            return gram
        size = self.column_scale.float()
        return gram * size * size.unsqueeze(1)
