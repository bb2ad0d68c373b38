"""PQI, the post-quantization integral: what rounding each weight costs the loss on given batches.

Between a model's weights `w` and their rounded values `w~` the loss changes by the integral of its gradient
along the straight line from one to the other:

    F(w~) - F(w) = sum_i (w~_i - w_i) * integral_0^1 dF/dw_i (w + t (w~ - w)) dt

Each term is the PQI of that weight: what the loss would win, about, were it not rounded. A gradient at `w`
alone (Taylor) misses most of it, since a trained model sits where its gradient is small. Layers compute with
the moved weight, made when it is needed, and a layer's gradient goes to whoever asked as soon as it is known:
memory is the model, and one layer's gradient. Not here: which values are rounded to (`quantize.sensitivity`).

Source: arXiv 2503.01901; the integral is theirs, the midpoint rule is ours (its error falls with the square
of the number of steps, theirs with the number).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from svdq_hf.calibration.inputs import call, evaluating, writes

Loss = Callable[[nn.Module, Any], Tensor]
"""A function of a model and a batch that returns a mean loss, a scalar that has a gradient."""

RULES = {"midpoint": 0.5, "left": 0.0, "right": 1.0}
"""Where in its step the gradient is taken; "left" and "right" are one-sided sums, as the paper's."""


@dataclass
class Line:
    """The way of one linear layer from its dense weight to its rounded one.

    Attributes:
        module: the dense layer.
        dense: returns its weight `[out, in]`, of any float dtype.
        rounded: returns the rounded weight `[out, in]`, float32.
    """

    module: nn.Module
    dense: Callable[[], Tensor]
    rounded: Callable[[], Tensor]

    def at(self, place: float) -> Tensor:
        """The weight `[out, in]`, float32, at a place between 0 (dense) and 1 (rounded)."""
        return torch.lerp(self.dense().float(), self.rounded(), place)

    def difference(self) -> Tensor:
        """Rounded minus dense, `[out, in]`, float32."""
        return self.rounded() - self.dense().float()


Take = Callable[[str, Tensor, float], None]
"""Receives a layer's name, the gradient `[out, in]` of its weight by one sequence, float32, and the place on
the line."""


def model_loss(model: nn.Module, batch: Any) -> Tensor:
    """The loss that a transformers model returns for a batch; of its next tokens where it has no labels.

    Args:
        model: the model.
        batch: a mapping of keyword arguments; without `labels`, a causal model predicts its `input_ids`,
            `[batch, tokens]`, those that `attention_mask` shows.

    Returns:
        The mean loss, a scalar.

    Raises:
        ValueError: the batch has no labels and is not one of a causal model, or the model returns no loss.
    """
    if isinstance(batch, Mapping) and "labels" not in batch:
        batch = {**batch, "labels": _next_tokens(model, batch)}
    found = getattr(call(model, batch), "loss", None)
    if not isinstance(found, Tensor):
        raise ValueError(
            f"{type(model).__name__} returned no loss: give batches with labels, or a loss of your own"
        )
    return found


def _next_tokens(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    if not isinstance(ids, Tensor) or not writes(model):
        raise ValueError(
            f"a batch for {type(model).__name__} needs 'labels', since a loss is asked for; a text alone "
            "gives one to causal models: put labels into the batches of quantize_model(model, config, "
            "batches), or take saliency 'awq'"
        )
    return ids if mask is None else ids.masked_fill(mask == 0, -100)


def places(steps: int, rule: str = "midpoint") -> list[float]:
    """Where on the line gradients are taken.

    Args:
        steps: equal steps that the line is divided into.
        rule: one of `RULES`.

    >>> places(2), places(2, "left")
    ([0.25, 0.75], [0.0, 0.5])
    """
    return [(step + RULES[rule]) / steps for step in range(steps)]


def walk(
    model: nn.Module,
    lines: Mapping[str, Line],
    batches: Sequence[Any],
    at: Sequence[float],
    take: Take,
    loss: Loss = model_loss,
) -> Iterator[tuple[float, float]]:
    """Take all layers along their lines together, and hand out gradients of the mean loss over the batches.

    Each sequence of a batch hands out a gradient of its own, and each time that a layer runs; they add up.

    Args:
        model: the dense model; it is in evaluation mode meanwhile, and left as it was.
        lines: of the layers that move, by name.
        batches: what the loss takes.
        at: places on the line, see `places`.
        take: receives the gradients, divided by the number of batches.
        loss: of one batch.

    Yields:
        For each batch of each place: the place, and the loss there.

    Raises:
        ValueError: a loss that is not finite, or has no gradient.
    """
    with _moving(model, lines, take) as moved:
        for place in at:
            for batch in batches:
                moved.place = place
                found = loss(model, batch)
                _check(found)
                torch.autograd.backward(found / len(batches))
                yield place, float(found.detach())


def _check(found: Tensor) -> None:
    if not bool(torch.isfinite(found.detach()).all()):
        raise ValueError("the loss is NaN or infinite on a batch")
    if found.numel() != 1 or not found.requires_grad:
        raise ValueError("the loss must be a scalar that is computed from the model's layers")


class _Moved:
    """Where on the line the layers are, and who receives gradients."""

    def __init__(self, take: Take) -> None:
        self.place = 0.0
        self.take = take
        self.anchor = torch.zeros((), requires_grad=True)  # or autograd would see nothing to derive


@contextmanager
def _moving(model: nn.Module, lines: Mapping[str, Line], take: Take) -> Iterator[_Moved]:
    """Context manager: the layers compute with moved weights; nothing else of the model has a gradient."""
    moved = _Moved(take)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    replaced = {line.module: line.module.__dict__.get("forward") for line in lines.values()}
    with evaluating(model):
        try:
            for parameter in trained:
                parameter.requires_grad_(False)
            for name, line in lines.items():
                line.module.forward = _forward(name, line, moved)
            with torch.enable_grad():
                yield moved
        finally:
            for module, forward in replaced.items():
                del module.forward
                if forward is not None:
                    module.forward = forward
            for parameter in trained:
                parameter.requires_grad_(True)


def _forward(name: str, line: Line, moved: _Moved) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        y: Tensor = _Product.apply(x, moved.anchor, name, line, moved)  # type: ignore[no-untyped-call]
        bias = line.module.bias
        return y + bias if isinstance(bias, Tensor) else y

    return forward


class _Product(torch.autograd.Function):
    """`x @ weight.T` with the weight of a place; its gradient is handed out and not kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, name: str, line: Line, moved: _Moved) -> Tensor:
        ctx.save_for_backward(x)
        ctx.name, ctx.line, ctx.take, ctx.place = name, line, moved.take, moved.place
        return x @ line.at(moved.place).to(x.dtype).T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        (x,), (grad,) = ctx.saved_tensors, grads
        for above, below in zip(_sequences(grad), _sequences(x), strict=True):
            ctx.take(ctx.name, above.T.float() @ below.float(), ctx.place)
        back = grad @ ctx.line.at(ctx.place).to(grad.dtype) if ctx.needs_input_grad[0] else None
        return back, None, None, None, None


def _sequences(values: Tensor) -> list[Tensor]:
    """The tokens `[tokens, features]` of each sequence; of all where they are not told apart."""
    return [values] if values.ndim < 3 else list(values.flatten(1, -2))
