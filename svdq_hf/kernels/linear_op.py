"""The op `svdq::linear`: its schema, its shapes without data, and its gradients.

Every backend keeps this contract: `x [..., in] -> y [..., out]`, y in x's dtype,
`y = x @ W.T + bias` with `W = row_scale * scale * level(code) * column_scale + salient`. Gradients
exist for x, bias and salient_values; backward keeps no dense weight. `fast` allows a kernel to round the
activations of a few tokens to 16 bits; kernels that would not gain by it do not. Not here: what arguments
must be (`kernels.contract`), which code computes (`kernels.backends`).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from svdq_hf.format.parts import PARTS, StoredWeight
from svdq_hf.kernels.backends import backend_for
from svdq_hf.kernels.contract import check_input_gradient, check_linear

STORED = (
    "Tensor weight, Tensor weight_scale, Tensor salient_values, Tensor salient_rows, Tensor salient_columns, "
    "Tensor? row_scale, Tensor? column_scale, Tensor? levels"
)
LINEAR = "svdq::linear"
INPUT_GRADIENT = "svdq::input_gradient"

torch.library.define(
    LINEAR,
    f"(Tensor x, {STORED}, Tensor? bias, int in_features, int group, bool fast=False) -> Tensor",
)
torch.library.define(INPUT_GRADIENT, f"(Tensor gradient, {STORED}, int in_features, int group) -> Tensor")


def linear(*inputs: Any) -> Tensor:
    """Call `svdq::linear`; without its autograd, which takes longer than a small layer, where none is needed.

    Args:
        *inputs: x `[..., in]`, the stored parts, bias `[out]` or None, in_features, group, fast.

    Returns:
        `[..., out]`, in the dtype of x.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return _OP(*inputs)  # type: ignore[no-any-return]
    with torch._C._AutoDispatchBelowAutograd():
        return _OP(*inputs)  # type: ignore[no-any-return]


class LinearArguments(NamedTuple):
    """The arguments of `svdq::linear`. torch omits `fast` where it is false; here it is always present.

    Attributes:
        x: activations `[..., in]`.
        stored: the weight `[out, in]`.
        bias: `[out]`, or None.
        in_features: columns of the weight.
        group: columns that share a scale.
        fast: whether activations of few tokens may be rounded to 16 bits.
    """

    x: Tensor
    stored: StoredWeight
    bias: Tensor | None
    in_features: int
    group: int
    fast: bool = False

    @classmethod
    def of(cls, inputs: Sequence[Any]) -> "LinearArguments":
        """The arguments from the op's positional ones, or one value for each (torch may append one more)."""
        return cls(inputs[0], StoredWeight(*inputs[1:_AFTER]), *inputs[_AFTER : _AFTER + 4])


class GradientArguments(NamedTuple):
    """The arguments of `svdq::input_gradient`.

    Attributes:
        gradient: `[..., out]`.
        stored: the weight `[out, in]`.
        in_features: columns of the weight.
        group: columns that share a scale.
    """

    gradient: Tensor
    stored: StoredWeight
    in_features: int
    group: int

    @classmethod
    def of(cls, inputs: Sequence[Any]) -> "GradientArguments":
        """The arguments from the op's positional ones, or one value for each (torch may append one more)."""
        return cls(inputs[0], StoredWeight(*inputs[1:_AFTER]), *inputs[_AFTER : _AFTER + 2])


_AFTER = 1 + len(PARTS)
"""Position after the stored parts in the ops' arguments."""


@torch.library.impl(LINEAR, "CompositeExplicitAutograd")
def _linear(*inputs: Any) -> Tensor:
    x, stored, bias, in_features, group, fast = LinearArguments.of(inputs)
    check_linear(x, stored, bias, in_features, group)
    backend = backend_for(x, stored, in_features, group)
    return backend.linear(x, with_float32_values(stored), bias, in_features, group, fast)


@torch.library.impl(INPUT_GRADIENT, "CompositeExplicitAutograd")
def _input_gradient(*inputs: Any) -> Tensor:
    gradient, stored, in_features, group = GradientArguments.of(inputs)
    check_input_gradient(gradient, stored, in_features, group)
    backend = backend_for(gradient, stored, in_features, group)
    return backend.input_gradient(gradient, with_float32_values(stored), in_features, group)


def with_float32_values(stored: StoredWeight) -> StoredWeight:
    """The weight with salient values in FP32; FSDP's mixed precision casts them as any parameter.

    They are cast inside the op, not before: so what the op saves for backward is FSDP's own tensor, which
    FSDP can free and gather again.
    """
    if stored.salient_values.dtype == torch.float32:
        return stored
    return stored._replace(salient_values=stored.salient_values.float())


def _linear_shape(*inputs: Any) -> Tensor:
    x, stored, bias, in_features, group, _ = LinearArguments.of(inputs)
    check_linear(x, stored, bias, in_features, group)
    return x.new_empty(*x.shape[:-1], stored.out)


def _input_gradient_shape(*inputs: Any) -> Tensor:
    gradient, stored, in_features, group = GradientArguments.of(inputs)
    check_input_gradient(gradient, stored, in_features, group)
    return gradient.new_empty(*gradient.shape[:-1], in_features)


def gradients_of(values: Tensor | None) -> StoredWeight:
    """The gradients of the stored parts that backward returns: only the salient values have one.

    Args:
        values: gradient of the salient values, `[k]` (experts: `[experts, k]`), or None.
    """
    return StoredWeight(None, None, values, None, None)  # type: ignore[arg-type]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, stored, bias, ctx.in_features, ctx.group, _ = LinearArguments.of(inputs)
    wanted = LinearArguments.of(ctx.needs_input_grad)
    ctx.save_for_backward(x if wanted.stored.salient_values else None, *stored)
    ctx.bias_dtype = bias.dtype if bias is not None and wanted.bias else None
    ctx.numbers = len(inputs) - len((x, *stored, bias))


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, *parts = ctx.saved_tensors
    stored, wanted = StoredWeight(*parts), LinearArguments.of(ctx.needs_input_grad)
    for_x = for_values = for_bias = None
    if wanted.x:
        for_x = torch.ops.svdq.input_gradient(gradient, *stored, ctx.in_features, ctx.group)
    if x is not None:
        for_values = values_gradient(x, gradient, stored.salient_rows, stored.salient_columns)
    if ctx.bias_dtype is not None:
        for_bias = gradient.reshape(-1, gradient.shape[-1]).sum(0).to(ctx.bias_dtype)
    return for_x, *gradients_of(for_values), for_bias, *[None] * ctx.numbers


def _save_gradient(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gradient, stored, ctx.in_features, ctx.group = GradientArguments.of(inputs)
    ctx.save_for_backward(gradient, *stored)


def _backward_gradient(ctx: Any, second: Tensor) -> tuple[Tensor | None, ...]:
    """Backward of `gradient @ W`, which a gradient penalty needs."""
    gradient, *parts = ctx.saved_tensors
    stored, wanted = StoredWeight(*parts), GradientArguments.of(ctx.needs_input_grad)
    for_gradient = for_values = None
    if wanted.gradient:
        for_gradient = torch.ops.svdq.linear(second, *stored, None, ctx.in_features, ctx.group)
    if wanted.stored.salient_values:
        for_values = values_gradient(second, gradient, stored.salient_rows, stored.salient_columns)
    return for_gradient, *gradients_of(for_values), None, None


GATHERED = 1 << 22
"""Products of activation and gradient held at a time: 16 MiB of float32."""


def values_gradient(x: Tensor, gradient: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The gradient of the salient values: the sum over tokens of `gradient[:, row] * x[:, column]`.

    Args:
        x: activations `[..., in]`.
        gradient: of the output, `[..., out]`.
        rows: rows of the salient entries, `[k]`.
        columns: columns of the salient entries, `[k]`.

    Returns:
        `[k]`, float32.
    """
    tokens, gradients = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
    step = max(1, GATHERED // max(1, tokens.shape[0]))
    pieces = [
        (
            gradients.index_select(1, rows[start : start + step]).float()
            * tokens.index_select(1, columns[start : start + step]).float()
        ).sum(0)
        for start in range(0, rows.shape[0], step)
    ]
    return torch.cat(pieces) if pieces else torch.zeros(0, dtype=torch.float32, device=x.device)


torch.library.register_fake(LINEAR, _linear_shape)
torch.library.register_fake(INPUT_GRADIENT, _input_gradient_shape)
torch.library.register_autograd(LINEAR, _backward, setup_context=_save)
torch.library.register_autograd(INPUT_GRADIENT, _backward_gradient, setup_context=_save_gradient)
_OP = torch.ops.svdq.linear.default
