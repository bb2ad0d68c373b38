"""A weight as its grid rounds it: its column scale found, and taken out of the weight and of the Gram matrix.

The one place where a column scale is found for a weight; scoring, rounding and error feedback take it from
here. Not here: what a config adds (`quantize.prepared`), and what is stored (`format.encode`).
"""

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from svdq_hf.core.column_scale import column_scale
from svdq_hf.core.error_feedback import damped
from svdq_hf.core.grid import Grid


@dataclass(eq=False)
class NormalizedWeight:
    """A weight `[out, in]` to be rounded on a grid.

    Args:
        dense: the weight, `[out, in]`, of any float dtype; never changed here.
        grid: the grid it is rounded on.
        input_gram: `X^T X` `[in, in]` of the layer's inputs, for error feedback; None: none.
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
        """The scale of each column, `[in]`, bfloat16; None where the grid has none."""
        return column_scale(self.dense.float()) if self.grid.column_scale else None

    @property
    def normalized(self) -> Tensor:
        """`dense / column_scale`, `[out, in]`, float32.

        Computed anew at each access: to keep it would cost a second dense copy.
        """
        dense = self.dense.float()
        return dense if self.column_scale is None else dense / self.column_scale.float()

    def rows(self, rows: slice) -> Tensor:
        """Some rows of `normalized`, `[rows, in]`, float32.

        Args:
            rows: which ones.
        """
        dense = self.dense[rows].float()
        return dense if self.column_scale is None else dense / self.column_scale.float()

    def without(self, rows: Tensor, columns: Tensor) -> Tensor:
        """A copy of `normalized` with zeros at some positions.

        Args:
            rows: row of each position, `[k]`.
            columns: column of each position, `[k]`.

        Returns:
            `[out, in]`, float32.
        """
        rest = self.normalized
        rest = rest.clone() if rest.data_ptr() == self.dense.data_ptr() else rest
        rest[rows.long(), columns.long()] = 0
        return rest

    @cached_property
    def gram(self) -> Tensor | None:
        """The damped Gram matrix `[in, in]` of the inputs of `normalized`; None without error feedback."""
        gram = self.input_gram
        if gram is not None and self.extra_damping:
            gram = damped(gram, self.column_scale, self.extra_damping)
        if gram is None or self.column_scale is None:
            return gram
        size = self.column_scale.float()
        return gram * size * size.unsqueeze(1)
