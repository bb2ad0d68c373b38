"""The op `svdq::expert_linear`: each token times its expert's matrix, `x [n, in] -> [n, out]`.

Tokens are sorted by expert; experts without tokens are skipped. For the others it is `svdq::linear` on slices
of the stacked parts, so every backend of that computes this; a backend that has a launch for all of them
takes it. `ends` `[experts]` says where each expert's
tokens end; rows after the last end are zero. With `sparse`, tokens that are all zero are skipped and their
rows stay zero. As an op, the loop over experts, which looks at data, is one node of a graph. Not here: the
module (`nn.experts`).
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from svdq_hf.format.parts import PARTS, StoredWeight
from svdq_hf.kernels.backends import LOOKS_AT_DATA, backend_for
from svdq_hf.kernels.contract import check_ends, check_experts, check_experts_gradient, check_values_gradient
from svdq_hf.kernels.linear_op import STORED, gradients_of, linear, values_gradient, with_float32_values
from svdq_hf.kernels.positions import check_positions

LINEAR = "svdq::expert_linear"
INPUT_GRADIENT = "svdq::expert_input_gradient"
VALUES_GRADIENT = "svdq::expert_values_gradient"
_LAST = "Tensor ends, int in_features, int group, bool sparse"

UNSAFE = (torch.Tag.cudagraph_unsafe,)  # backward goes from expert to expert, which looks at data
torch.library.define(LINEAR, f"(Tensor x, {STORED}, {_LAST}) -> Tensor", tags=LOOKS_AT_DATA)
torch.library.define(INPUT_GRADIENT, f"(Tensor gradient, {STORED}, {_LAST}) -> Tensor", tags=UNSAFE)
torch.library.define(
    VALUES_GRADIENT,
    "(Tensor x, Tensor gradient, Tensor rows, Tensor columns, Tensor ends) -> Tensor",
    tags=UNSAFE,
)


_AFTER = 1 + len(PARTS)
"""Position after the stored parts in the ops' arguments."""


class ExpertArguments(NamedTuple):
    """The arguments of `svdq::expert_linear` and `svdq::expert_input_gradient`.

    Attributes:
        tokens: x `[n, in]`, or a gradient `[n, out]`, sorted by expert.
        stored: the stacked weights `[experts, out, in]`.
        ends: where each expert's tokens end, `[experts]`.
        in_features: columns of each weight.
        group: columns that share a scale.
        sparse: whether tokens that are all zero are skipped.
    """

    tokens: Tensor
    stored: StoredWeight
    ends: Tensor
    in_features: int
    group: int
    sparse: bool

    @classmethod
    def of(cls, inputs: Sequence[Any]) -> "ExpertArguments":
        """The arguments from the op's positional ones, or one value for each (torch may append one more)."""
        return cls(inputs[0], StoredWeight(*inputs[1:_AFTER]), *inputs[_AFTER : _AFTER + 4])


def _hit(ends: Tensor, tokens: Tensor, sparse: bool) -> Iterator[tuple[int, Any]]:
    """The experts that have tokens, with their rows: a slice, or an index where `sparse`."""
    start, stops = 0, ends.tolist()
    check_ends(stops, tokens.shape[0])
    for expert, end in enumerate(stops):
        rows: Any = slice(start, end)
        if sparse and end > start:
            rows = start + tokens[rows].any(1).nonzero().squeeze(1)
        if end > start and (not sparse or rows.numel()):
            yield expert, rows
        start = end


def _of(stored: StoredWeight, expert: int) -> StoredWeight:
    return StoredWeight(*(None if part is None else part[expert] for part in stored))  # type: ignore[arg-type]


@torch.library.impl(LINEAR, "CompositeExplicitAutograd")
def _linear(*inputs: Any) -> Tensor:
    x, stored, ends, in_features, group, sparse = ExpertArguments.of(inputs)
    check_experts(x, stored, ends, in_features, group)
    together = backend_for(x, _of(stored, 0), in_features, group).experts
    if together is not None:
        return together(x, with_float32_values(stored), ends, in_features, group)
    y = x.new_zeros(x.shape[0], stored.weight.shape[1])
    for expert, rows in _hit(ends, x, sparse):
        y[rows] = linear(x[rows], *_of(stored, expert), None, in_features, group)
    return y


@torch.library.impl(INPUT_GRADIENT, "CompositeExplicitAutograd")
def _input_gradient(*inputs: Any) -> Tensor:
    gradient, stored, ends, in_features, group, sparse = ExpertArguments.of(inputs)
    check_experts_gradient(gradient, stored, ends, in_features, group)
    total = gradient.new_zeros(gradient.shape[0], in_features)
    for expert, rows in _hit(ends, gradient, sparse):
        total[rows] = torch.ops.svdq.input_gradient(gradient[rows], *_of(stored, expert), in_features, group)
    return total


@torch.library.impl(VALUES_GRADIENT, "CompositeExplicitAutograd")
def _values_gradient(x: Tensor, gradient: Tensor, rows: Tensor, columns: Tensor, ends: Tensor) -> Tensor:
    """The gradient of all experts' salient values, `[experts, k]`, float32."""
    check_values_gradient(x, gradient, rows, columns, ends)
    found = torch.zeros(rows.shape, dtype=torch.float32, device=x.device)
    for expert, tokens in _hit(ends, x, sparse=False):
        check_positions(rows[expert], columns[expert], gradient.shape[1], x.shape[1])
        found[expert] = values_gradient(x[tokens], gradient[tokens], rows[expert], columns[expert])
    return found


def _linear_shape(*inputs: Any) -> Tensor:
    x, stored, ends, in_features, group, _ = ExpertArguments.of(inputs)
    check_experts(x, stored, ends, in_features, group)
    return x.new_empty(x.shape[0], stored.weight.shape[1])


def _input_gradient_shape(*inputs: Any) -> Tensor:
    gradient, stored, ends, in_features, group, _ = ExpertArguments.of(inputs)
    check_experts_gradient(gradient, stored, ends, in_features, group)
    return gradient.new_empty(gradient.shape[0], in_features)


def _values_gradient_shape(
    x: Tensor, gradient: Tensor, rows: Tensor, columns: Tensor, ends: Tensor
) -> Tensor:
    check_values_gradient(x, gradient, rows, columns, ends)
    return torch.empty(rows.shape, dtype=torch.float32, device=x.device)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, stored, ends, ctx.in_features, ctx.group, ctx.sparse = ExpertArguments.of(inputs)
    wanted = ExpertArguments.of(ctx.needs_input_grad)
    ctx.save_for_backward(x if wanted.stored.salient_values else None, ends, *stored)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, ends, *parts = ctx.saved_tensors
    stored, wanted = StoredWeight(*parts), ExpertArguments.of(ctx.needs_input_grad)
    others = (*stored, ends, ctx.in_features, ctx.group, ctx.sparse)
    for_x = torch.ops.svdq.expert_input_gradient(gradient, *others) if wanted.tokens else None
    return for_x, *gradients_of(_for_values(x, gradient, stored, ends)), *_NONE_FOR_THE_LAST


def _save_gradient(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gradient, stored, ends, ctx.in_features, ctx.group, ctx.sparse = ExpertArguments.of(inputs)
    ctx.save_for_backward(gradient, ends, *stored)


def _backward_gradient(ctx: Any, second: Tensor) -> tuple[Tensor | None, ...]:
    """Backward of `gradient @ W`, which a gradient penalty needs."""
    gradient, ends, *parts = ctx.saved_tensors
    stored, wanted = StoredWeight(*parts), ExpertArguments.of(ctx.needs_input_grad)
    others = (*stored, ends, ctx.in_features, ctx.group, ctx.sparse)
    for_gradient = torch.ops.svdq.expert_linear(second, *others) if wanted.tokens else None
    x = second if wanted.stored.salient_values else None
    return for_gradient, *gradients_of(_for_values(x, gradient, stored, ends)), *_NONE_FOR_THE_LAST


def _for_values(x: Tensor | None, gradient: Tensor, stored: StoredWeight, ends: Tensor) -> Tensor | None:
    if x is None:
        return None
    positions = stored.salient_rows, stored.salient_columns
    return torch.ops.svdq.expert_values_gradient(x, gradient, *positions, ends)  # type: ignore[no-any-return]


_NONE_FOR_THE_LAST = [None] * 4
"""Gradients of the arguments in `_LAST`: none."""

torch.library.register_fake(LINEAR, _linear_shape)
torch.library.register_fake(INPUT_GRADIENT, _input_gradient_shape)
torch.library.register_fake(VALUES_GRADIENT, _values_gradient_shape)
torch.library.register_autograd(LINEAR, _backward, setup_context=_save)
torch.library.register_autograd(INPUT_GRADIENT, _backward_gradient, setup_context=_save_gradient)


def expert_linear(*inputs: Any) -> Tensor:
    """Call `svdq::expert_linear`.

    Args:
        *inputs: x `[n, in]`, the stacked parts, ends `[experts]`, in_features, group, sparse.

    Returns:
        `[n, out]`, in the dtype of x.
    """
    return torch.ops.svdq.expert_linear(*inputs)  # type: ignore[no-any-return]
