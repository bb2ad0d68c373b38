"""SVDQIntegerLinear: a linear layer whose inputs are rounded to integers, as its weight is (W4A4).

The input is turned and ordered (`core.activations`), each token is rounded, and the product is that of whole
numbers; in the columns of the subspace both factors have 8 bits. Rounding has no gradient, so neither has the
layer: going back through it is an error, since a gradient that passes it by would be wrong. Not here: the
product (`kernels.integer_product`), how the weight is made (`quantize.integer_weight`).

Source: arXiv 2412.14363 (ResQ).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from svdq_hf.core.activations import SUBSPACE_BITS, Activations, round_tokens
from svdq_hf.format.parts import SUBSPACE_PARTS, Scheme, part_specs
from svdq_hf.format.subspace import arranged_weight, halves
from svdq_hf.kernels.backends import Choice
from svdq_hf.kernels.integer_product import multiply
from svdq_hf.nn.linear import SVDQLinear, as_computed, keeping_dtypes, leaf_of_a_trace

NO_GRADIENT = (
    "a layer that rounds its activations has no gradient (SVDQConfig.resq()): train the dense model and "
    "quantize it then, or quantize weights alone (SVDQConfig.best())"
)
"""What training is told."""


class SVDQIntegerLinear(SVDQLinear):
    """`y = round(x) @ W.T + bias`, x `[..., in]` -> y `[..., out]`, from integers of 4 and 8 bits.

    Args:
        in_features: columns of W.
        out_features: rows of W.
        scheme: how W is stored and x rounded; it has `activations`.
        **more: as for SVDQLinear.
    """

    subspace_weight: nn.Parameter | None
    subspace_scale: Tensor | None

    def __init__(self, in_features: int, out_features: int, scheme: Scheme, **more: Any) -> None:
        super().__init__(in_features, out_features, scheme, **more)
        self.group = scheme.grid.columns(scheme.columns(in_features)[0])
        specs = part_specs(out_features, in_features, scheme)
        shapes = [specs[name] for name in SUBSPACE_PARTS if name in specs]
        empty = [torch.empty(one.shape, dtype=one.dtype, device=self.weight.device) for one in shapes]
        codes, scale = empty or (None, None)
        self.register_parameter(
            "subspace_weight", None if codes is None else nn.Parameter(codes, requires_grad=False)
        )
        self.register_buffer("subspace_scale", scale)

    @property
    def activations(self) -> Activations:
        """How inputs are rounded."""
        return self.scheme.activations or Activations()

    def dequantize(self) -> Tensor:
        """The weight `[out, in]`, float32, for inputs that are neither turned nor ordered."""
        arranged = arranged_weight(self.parts(), self.in_features, self.scheme)
        return self.activations.restored(arranged)

    def forward(self, x: Tensor) -> Tensor:
        """The product: x `[..., in]` -> `[..., out]`."""
        if isinstance(x, Proxy):
            return leaf_of_a_trace(self, x)
        x, result = as_computed(x, self.compute_dtype)
        with torch.no_grad():
            arranged = self.activations.arranged(x).reshape(-1, self.in_features)
            y = self._product(arranged)
            if self.bias is not None:
                y = y + self.bias.double()
        y = y.to(result).view(*x.shape[:-1], self.out_features)
        return self._without_gradient(y, x) if torch.is_grad_enabled() else y

    def _without_gradient(self, y: Tensor, x: Tensor) -> Tensor:
        """The product y, through which no gradient reaches x or the bias unseen."""
        if not x.requires_grad and (self.bias is None or not self.bias.requires_grad):
            return y
        refusing: Tensor = _WithoutGradient.apply(y, x, self.bias)  # type: ignore[no-untyped-call]
        return refusing

    def _product(self, x: Tensor) -> Tensor:
        """The product of arranged tokens `[tokens, in]` and the weight, float64."""
        low = self.scheme.columns(self.in_features)[0]
        both = halves(self.parts(), self.in_features, self.scheme)
        bits = (self.activations.bits, SUBSPACE_BITS)
        columns = (x[:, :low], x[:, low:])
        first, *more = (
            multiply(round_tokens(part, width), half.parts, half.group)
            for half, width, part in zip(both, bits, columns, strict=False)  # one half: no subspace
        )
        return sum(more, first)

    def backend(self, x: Tensor) -> Choice:
        """Which backend computes this layer: plain torch, for every input and device.

        Args:
            x: `[..., in]`.
        """
        return Choice("integers", {})

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SVDQIntegerLinear":
        super()._apply(keeping_dtypes(fn, [self.subspace_scale]), recurse)
        return self

    def extra_repr(self) -> str:
        own = self.activations
        text = f"{super().extra_repr()}, activations={own.bits}, subspace={own.subspace:g}"
        text += f", heads={own.heads}" if own.heads > 1 else ""
        return text + (", hadamard=True" if own.hadamard else "")


class _WithoutGradient(torch.autograd.Function):
    """The product as it is; going back is an error, where gradients would pass it by in silence."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
        """The product y, which depends on x and bias."""
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """Refuse.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(NO_GRADIENT)
