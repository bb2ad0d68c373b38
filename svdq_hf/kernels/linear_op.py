"""`svdq::linear`, the one op: its schema, shapes without data, gradients, and default kernel.

Whatever computes it, the contract is this file: `x [..., in] -> y [..., out]`, y in x's dtype,
`y = x @ W.T + bias` with `W = row_scale * scale * level(code) * column_scale + salient`. Gradients
exist for x, bias and salient_values; backward keeps no dense weight. `fast` lets a kernel round the
activations of a few tokens to 16 bits; one that has nothing to win by it does not. Faster kernels register
themselves for their device and nothing else changes.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from svdq_hf.format.parts import PARTS
from svdq_hf.kernels import cpu, reference

STORED = (
    "Tensor weight, Tensor weight_scale, Tensor salient_values, Tensor salient_rows, Tensor salient_columns, "
    "Tensor? row_scale, Tensor? column_scale, Tensor? levels"
)
TAGS = (torch.Tag.cudagraph_unsafe,)  # the reference kernel looks at positions
LINEAR = "svdq::linear"
INPUT_GRADIENT = "svdq::input_gradient"

torch.library.define(
    LINEAR,
    f"(Tensor x, {STORED}, Tensor? bias, int in_features, int group, bool fast=False) -> Tensor",
    tags=TAGS,
)
torch.library.define(
    INPUT_GRADIENT, f"(Tensor gradient, {STORED}, int in_features, int group) -> Tensor", tags=TAGS
)


def linear(*inputs: Any) -> Tensor:
    """Call the op; without its autograd, which takes longer than a small layer, where there is none to do."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return _OP(*inputs)  # type: ignore[no-any-return]
    with torch._C._AutoDispatchBelowAutograd():
        return _OP(*inputs)  # type: ignore[no-any-return]


@torch.library.impl(LINEAR, "CompositeExplicitAutograd")
def _linear(x: Tensor, *others: Any) -> Tensor:
    stored, bias, in_features, group, fast = _arguments(others)
    stored = as_stored(stored)
    _check(x, stored[0], in_features)
    if cpu.computes(x, stored[0], in_features, group):
        return cpu.linear(x, stored, bias, in_features, group, fast=fast)
    return reference.linear(x, named(stored), bias, in_features, group)


@torch.library.impl(INPUT_GRADIENT, "CompositeExplicitAutograd")
def _input_gradient(gradient: Tensor, *others: Any) -> Tensor:
    *parts, in_features, group = others
    stored = as_stored(parts)
    if cpu.computes(gradient, stored[0], in_features, group):
        return cpu.input_gradient(gradient, stored, in_features, group)
    return reference.input_gradient(gradient, named(stored), in_features, group)


def as_stored(stored: Sequence[Any]) -> Sequence[Any]:
    """The stored arguments with FP32 salient values, which FSDP's mixed precision casts as any parameter.

    Not before the op: what it saves for backward is then FSDP's own, let go of and gathered again.
    """
    if stored[2].dtype == torch.float32:
        return stored
    return [*stored[:2], stored[2].float(), *stored[3:]]


def _arguments(others: Sequence[Any]) -> tuple[Sequence[Any], Tensor | None, int, int, bool]:
    """Stored parts, bias, in_features, group, fast: which torch leaves out where it is the default."""
    *rest, in_features, group, fast = others if len(others) == len(PARTS) + 4 else (*others, False)
    return rest[:-1], rest[-1], in_features, group, fast


def named(stored: Sequence[Tensor | None]) -> dict[str, Tensor]:
    """The op's stored arguments by name, without those that are absent."""
    return {name: part for name, part in zip(PARTS, stored, strict=True) if part is not None}


def _linear_shape(x: Tensor, weight: Tensor, *others: Any) -> Tensor:
    stored, _, in_features, _, _ = _arguments((weight, *others))
    _check(x, weight, in_features)
    together(x.device, stored)
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _input_gradient_shape(gradient: Tensor, *others: Any) -> Tensor:
    return gradient.new_empty(*gradient.shape[:-1], others[-2])


def _check(x: Tensor, weight: Tensor, in_features: int) -> None:
    if x.ndim == 0 or x.shape[-1] != in_features:
        raise ValueError(f"input {list(x.shape)} does not end in the layer's {in_features} features")
    if not x.is_floating_point():
        raise ValueError(
            f"input is {x.dtype}; the layer computes in floating point. If the model itself cast it to "
            "the dtype of this layer's weight, keep the layer dense: modules_to_not_convert"
        )
    if x.device != weight.device:
        raise ValueError(f"input is on {x.device} and the weight on {weight.device}; move one of them")


def together(device: torch.device, stored: Sequence[Tensor | None]) -> None:
    """Refuse parts of which one is elsewhere (offloaded, say): torch would answer with memory as it is.

    Raises:
        ValueError: it names the two devices.
    """
    for part in stored:
        if part is not None and part.device != device:
            raise ValueError(f"input is on {device} and a stored tensor on {part.device}; move one of them")


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *others = inputs
    stored, bias, in_features, group, _ = _arguments(others)
    for_values, for_bias = ctx.needs_input_grad[3], ctx.needs_input_grad[1 + len(PARTS)]
    ctx.save_for_backward(x if for_values else None, *stored)
    ctx.bias_dtype = bias.dtype if bias is not None and for_bias else None
    ctx.in_features, ctx.group, ctx.inputs = in_features, group, len(inputs)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, *stored = ctx.saved_tensors
    for_x = for_values = for_bias = None
    if ctx.needs_input_grad[0]:
        for_x = torch.ops.svdq.input_gradient(gradient, *stored, ctx.in_features, ctx.group)
    if x is not None:
        for_values = values_gradient(x, gradient, rows=stored[3], columns=stored[4])
    if ctx.bias_dtype is not None:
        for_bias = gradient.reshape(-1, gradient.shape[-1]).sum(0).to(ctx.bias_dtype)
    absent = [None] * (len(PARTS) - 3)  # of the parts only the salient values have a gradient
    return for_x, None, None, for_values, *absent, for_bias, *[None] * (ctx.inputs - len(PARTS) - 2)


def _save_gradient(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.in_features, ctx.group = inputs
    ctx.save_for_backward(*tensors)


def _backward_gradient(ctx: Any, second: Tensor) -> tuple[Tensor | None, ...]:
    """For `gradient @ W`: what a gradient penalty asks for."""
    gradient, *stored = ctx.saved_tensors
    for_gradient = for_values = None
    if ctx.needs_input_grad[0]:
        for_gradient = torch.ops.svdq.linear(second, *stored, None, ctx.in_features, ctx.group)
    if ctx.needs_input_grad[3]:
        for_values = values_gradient(second, gradient, rows=stored[3], columns=stored[4])
    return for_gradient, None, None, for_values, *[None] * (len(PARTS) - 3), None, None


GATHERED = 1 << 22
"""Products of activation and gradient held at a time: 16 MiB of float32."""


def values_gradient(x: Tensor, gradient: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """For each salient entry, `sum over tokens of gradient[:, row] * x[:, column]`: `[k]`, float32."""
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
