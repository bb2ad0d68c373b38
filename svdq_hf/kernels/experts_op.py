"""`svdq::expert_linear`: tokens sorted by expert, each times the matrix of its own: `x [n, in] -> [n, out]`.

An expert that no token chose is not looked at. For the others it is `svdq::linear` on slices of the stacked
parts, so whatever computes that on a device computes this. `ends` `[experts]` says where each one's tokens
stop; rows behind the last are zero. sparse: tokens that are all zero are not computed either, their rows stay
zero. As ops, the loops over experts that were hit, a question to the data, are one node of a graph.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from svdq_hf.format.parts import PARTS
from svdq_hf.kernels.linear_op import STORED, TAGS, linear, together, values_gradient

LINEAR = "svdq::expert_linear"
INPUT_GRADIENT = "svdq::expert_input_gradient"
VALUES_GRADIENT = "svdq::expert_values_gradient"
_LAST = "Tensor ends, int in_features, int group, bool sparse"

torch.library.define(LINEAR, f"(Tensor x, {STORED}, {_LAST}) -> Tensor", tags=TAGS)
torch.library.define(INPUT_GRADIENT, f"(Tensor gradient, {STORED}, {_LAST}) -> Tensor", tags=TAGS)
torch.library.define(
    VALUES_GRADIENT,
    "(Tensor x, Tensor gradient, Tensor rows, Tensor columns, Tensor ends) -> Tensor",
    tags=TAGS,
)


def _hit(ends: Tensor, tokens: Tensor, sparse: bool) -> Iterator[tuple[int, Any]]:
    """The experts that have tokens, with the rows of those: a slice, or of sparse tokens an index."""
    start = 0
    for expert, end in enumerate(ends.tolist()):
        rows: Any = slice(start, end)
        if sparse and end > start:
            rows = start + tokens[rows].any(1).nonzero().squeeze(1)
        if end > start and (not sparse or rows.numel()):
            yield expert, rows
        start = end


def _of(stored: list[Tensor | None], expert: int) -> list[Tensor | None]:
    return [None if part is None else part[expert] for part in stored]


@torch.library.impl(LINEAR, "CompositeExplicitAutograd")
def _linear(x: Tensor, *others: Any) -> Tensor:
    *stored, ends, in_features, group, sparse = others
    y = x.new_zeros(x.shape[0], stored[0].shape[1])
    for expert, rows in _hit(ends, x, sparse):
        y[rows] = linear(x[rows], *_of(stored, expert), None, in_features, group)
    return y


@torch.library.impl(INPUT_GRADIENT, "CompositeExplicitAutograd")
def _input_gradient(gradient: Tensor, *others: Any) -> Tensor:
    *stored, ends, in_features, group, sparse = others
    total = gradient.new_zeros(gradient.shape[0], in_features)
    for expert, rows in _hit(ends, gradient, sparse):
        total[rows] = torch.ops.svdq.input_gradient(gradient[rows], *_of(stored, expert), in_features, group)
    return total


@torch.library.impl(VALUES_GRADIENT, "CompositeExplicitAutograd")
def _values_gradient(x: Tensor, gradient: Tensor, rows: Tensor, columns: Tensor, ends: Tensor) -> Tensor:
    """Of all experts' salient values, `[experts, k]`, float32."""
    found = torch.zeros(rows.shape, dtype=torch.float32, device=x.device)
    for expert, tokens in _hit(ends, x, sparse=False):
        found[expert] = values_gradient(x[tokens], gradient[tokens], rows[expert], columns[expert])
    return found


def _linear_shape(x: Tensor, weight: Tensor, *others: Any) -> Tensor:
    together(x.device, others[:-4])
    return x.new_empty(x.shape[0], weight.shape[1])


def _input_gradient_shape(gradient: Tensor, *others: Any) -> Tensor:
    return gradient.new_empty(gradient.shape[0], others[-3])


def _values_gradient_shape(x: Tensor, gradient: Tensor, rows: Tensor, *others: Tensor) -> Tensor:
    return torch.empty(rows.shape, dtype=torch.float32, device=x.device)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *stored, ends, ctx.in_features, ctx.group, ctx.sparse = inputs
    ctx.save_for_backward(x if ctx.needs_input_grad[3] else None, ends, *stored)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, ends, *stored = ctx.saved_tensors
    others = (*stored, ends, ctx.in_features, ctx.group, ctx.sparse)
    for_x = torch.ops.svdq.expert_input_gradient(gradient, *others) if ctx.needs_input_grad[0] else None
    return for_x, None, None, _for_values(x, gradient, stored, ends), *_ABSENT


def _save_gradient(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gradient, *stored, ends, ctx.in_features, ctx.group, ctx.sparse = inputs
    ctx.save_for_backward(gradient, ends, *stored)


def _backward_gradient(ctx: Any, second: Tensor) -> tuple[Tensor | None, ...]:
    """For `gradient @ W`: what a gradient penalty asks for."""
    gradient, ends, *stored = ctx.saved_tensors
    others = (*stored, ends, ctx.in_features, ctx.group, ctx.sparse)
    for_gradient = torch.ops.svdq.expert_linear(second, *others) if ctx.needs_input_grad[0] else None
    wanted = second if ctx.needs_input_grad[3] else None
    return for_gradient, None, None, _for_values(wanted, gradient, stored, ends), *_ABSENT


def _for_values(x: Tensor | None, gradient: Tensor, stored: list[Tensor], ends: Tensor) -> Tensor | None:
    if x is None:
        return None
    return torch.ops.svdq.expert_values_gradient(x, gradient, stored[3], stored[4], ends)  # type: ignore[no-any-return]


_ABSENT = [None] * (len(PARTS) - 3 + 4)
"""Of the parts only the salient values have a gradient; of `_LAST` nothing has."""

torch.library.register_fake(LINEAR, _linear_shape)
torch.library.register_fake(INPUT_GRADIENT, _input_gradient_shape)
torch.library.register_fake(VALUES_GRADIENT, _values_gradient_shape)
torch.library.register_autograd(LINEAR, _backward, setup_context=_save)
torch.library.register_autograd(INPUT_GRADIENT, _backward_gradient, setup_context=_save_gradient)


def expert_linear(*inputs: Any) -> Tensor:
    """Call the op."""
    return torch.ops.svdq.expert_linear(*inputs)  # type: ignore[no-any-return]
