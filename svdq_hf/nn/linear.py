"""SVDQLinear: a quantized linear layer made of plain buffers and parameters.

No override of `state_dict`, `to` or `cuda`, and no tensor subclass is needed (`PackedCodes` only has a better
error). The one override is `_apply`:
whatever dtype the model is cast to, scales and salient weights keep theirs. Not here: the product
(`kernels.linear_op`).
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from svdq_hf.core.arguments import is_a
from svdq_hf.format.decode import reconstruct
from svdq_hf.format.parts import PARTS, Scheme, StoredWeight, part_specs
from svdq_hf.kernels import cpu_direct as direct
from svdq_hf.kernels import transforms
from svdq_hf.kernels.backends import Choice, choice
from svdq_hf.kernels.linear_op import linear
from svdq_hf.kernels.positions import check_positions

FLOAT_PARTS = ("weight_scale", "salient_values", "row_scale", "column_scale")
"""Parts that may be floating point: their dtype is the format's, whatever the model is cast to."""

FLOATS_FIRST = tuple(sorted(PARTS, key="salient_values".__ne__))
"""The parts in the order of a module's tensors, behind its bias: families ask for the dtype of a module's
first parameter (Swin V2 for that of its position bias), and are not to get that of packed bytes."""


class SVDQLinear(nn.Module):
    """`y = x @ W.T + bias`, x `[..., in]` -> y `[..., out]`, with W in a few bits except for k entries.

    The stored tensors are those of `part_specs`; they are created empty, and filled by `load_parts` or by
    loading a state dict. `salient_values` is a parameter and can be trained; `weight` is a frozen
    parameter of packed bytes, since FSDP shards parameters alone and accelerate moves to disk parameters
    alone; the rest are buffers.

    Args:
        in_features: columns of W.
        out_features: rows of W.
        scheme: how W is stored.
        bias: whether there is a bias `[out]`.
        dtype: of the bias.
        device: of the empty tensors.
        compute_dtype: dtype that the input is cast to for the product; the output has the input's dtype.
            None: the input's.
        transposed: whether the layer replaces one that stores its weight as `[in, out]` (GPT-2's Conv1D).
        fast: whether a kernel may round the activations of a few tokens to 16 bits
            (`SVDQConfig(compute="fast")`); not stored.
    """

    weight: nn.Parameter
    weight_scale: Tensor
    salient_values: nn.Parameter
    salient_rows: Tensor
    salient_columns: Tensor
    row_scale: Tensor | None
    column_scale: Tensor | None
    levels: Tensor | None
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scheme: Scheme | None = None,
        *,
        bias: bool = True,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        compute_dtype: torch.dtype | None = None,
        transposed: bool = False,
        fast: bool = False,
    ) -> None:
        super().__init__()
        _check_sizes(in_features, out_features, scheme)
        self.in_features, self.out_features = in_features, out_features
        self.scheme = scheme or Scheme()
        self.compute_dtype = compute_dtype
        self.transposed, self.fast = transposed, fast
        self.group = self.scheme.grid.columns(in_features)
        self.facts: dict[str, float] = {}
        """What was measured while quantizing, by name (`relative_error`, `sigma_ratio`)."""
        empty_bias = torch.empty(out_features, dtype=dtype, device=device)
        self.register_parameter("bias", nn.Parameter(empty_bias) if bias else None)
        specs = part_specs(out_features, in_features, self.scheme)
        for name in FLOATS_FIRST:
            if name not in specs:
                self.register_buffer(name, None)
                continue
            spec = specs[name]
            empty = torch.empty(spec.shape, dtype=spec.dtype, device=device)
            if name in ("weight", "salient_values"):
                setattr(
                    self,
                    name,
                    nn.Parameter(empty, requires_grad=name == "salient_values" and empty.numel() > 0),
                )
            else:
                self.register_buffer(name, empty)

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the weight, `(out, in)`."""
        return self.out_features, self.in_features

    def parts(self) -> dict[str, Tensor]:
        """The stored tensors of the weight `[out, in]` by name, detached, without the bias."""
        names = part_specs(self.out_features, self.in_features, self.scheme)
        return {name: getattr(self, name).detach() for name in names}

    def load_parts(self, parts: Mapping[str, Tensor]) -> None:
        """Put stored tensors into the layer.

        Args:
            parts: of a weight `[out, in]`, by name (`part_specs`).
        """
        for name, part in parts.items():
            current = getattr(self, name)
            if isinstance(current, nn.Parameter):
                part = nn.Parameter(part, requires_grad=current.requires_grad)
            setattr(self, name, part)

    def dequantize(self) -> Tensor:
        """The weight `[out, in]`, float32.

        Raises:
            ValueError: a salient position that was loaded is out of range or out of order.
        """
        check_positions(self.salient_rows, self.salient_columns, self.out_features, self.in_features)
        return reconstruct(self.parts(), self.in_features, self.scheme)

    def forward(self, x: Tensor) -> Tensor:
        """The product: x `[..., in]` -> `[..., out]`."""
        stored, bias = self.stored_and_bias()
        if self.compute_dtype is None:
            y = direct.linear(x, stored, bias, self.in_features, self.group, self.fast)
            if y is not None:
                return y
        if isinstance(x, Proxy):
            return leaf_of_a_trace(self, x)
        x, result = as_computed(x, self.compute_dtype)
        if transforms.is_transforming():
            y = transforms.linear(x, stored, bias, self.in_features, self.group)
        else:
            y = linear(x, *stored, bias, self.in_features, self.group, self.fast)
        return y if y.dtype == result else y.to(result)

    def stored_and_bias(self) -> tuple[StoredWeight, Tensor | None]:
        """The weight `[out, in]` and the bias `[out]`; access by attributes would take longer than the op."""
        parameters, buffers = self._parameters, self._buffers
        if "weight" not in parameters or "bias" not in parameters:  # a replica of DataParallel; parametrized
            return StoredWeight(*(getattr(self, name) for name in PARTS)), self.bias
        parts = (
            parameters["weight"],
            buffers["weight_scale"],
            parameters["salient_values"],
            buffers["salient_rows"],
            buffers["salient_columns"],
            buffers["row_scale"],
            buffers["column_scale"],
            buffers["levels"],
        )
        return tuple.__new__(StoredWeight, parts), parameters["bias"]  # half the time of StoredWeight(...)

    def backend(self, x: Tensor) -> Choice:
        """Which backend computes this layer for an input, and why earlier ones do not.

        Args:
            x: `[..., in]`; only its dtype and device matter.

        Returns:
            The name of the backend, and the reasons of those before it, by name.
        """
        x, _ = as_computed(x, self.compute_dtype)
        return choice(x, self.stored_and_bias()[0], self.in_features, self.group)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SVDQLinear":
        parts = (getattr(self, name) for name in FLOAT_PARTS)
        super()._apply(keeping_dtypes(fn, parts), recurse)  # type: ignore[no-untyped-call]
        return self

    def extra_repr(self) -> str:
        grid = self.scheme.grid
        text = (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, k={self.salient_values.numel()}, group_size={grid.group_size}"
        )
        text += f", bits={grid.bits}" if grid.bits != 4 else ""
        return text + (", transposed=True" if self.transposed else "")


def _check_sizes(in_features: int, out_features: int, scheme: Scheme | None) -> None:
    for name, size in (("in_features", in_features), ("out_features", out_features)):
        if not is_a(size, int):
            raise TypeError(f"{name}={size!r}: must be an int from 1 on")
        if size < 1:
            raise ValueError(f"{name}={size!r}: must be an int from 1 on")
    if not is_a(scheme, Scheme | None):
        raise TypeError(f"scheme={scheme!r}: must be a Scheme, such as SVDQConfig(k=256).scheme, or None")


def leaf_of_a_trace(module: nn.Module, *inputs: Any) -> Any:
    """A node of `torch.fx.symbolic_trace` that calls a module, as for torch's own modules.

    Args:
        module: the module.
        *inputs: its inputs, of which one is a proxy.

    Returns:
        The proxy of its output.
    """
    tracer: Any = next(one for one in inputs if isinstance(one, Proxy)).tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(module), inputs, {})


def as_computed(x: Tensor, compute_dtype: torch.dtype | None) -> tuple[Tensor, torch.dtype]:
    """The input in the dtype of the product, and the dtype of the output.

    Args:
        x: `[..., in]`.
        compute_dtype: of the product; None: the input's. Autocast overrides it.

    Returns:
        x `[..., in]`, cast, and the dtype.
    """
    if x.is_meta:  # torch knows no autocast there
        return (x if compute_dtype is None else x.to(compute_dtype)), x.dtype
    if torch.is_autocast_enabled(x.device.type):  # as of a dense layer, the output is autocast's
        result = torch.get_autocast_dtype(x.device.type)
        return x.to(result), result
    return (x if compute_dtype is None else x.to(compute_dtype)), x.dtype


def keeping_dtypes(
    fn: Callable[[Tensor], Tensor], parts: Iterable[Tensor | None]
) -> Callable[[Tensor], Tensor]:
    """A function for `nn.Module._apply` that leaves the dtypes of some tensors and their gradients unchanged.

    Args:
        fn: what `_apply` was called with.
        parts: tensors `[...]` whose dtype is kept, and None.
    """
    stored = [part for part in parts if part is not None]
    stored += [tensor.grad for tensor in stored if tensor.grad is not None]
    kept = {id(tensor): tensor for tensor in stored}  # which keeps the gradients' ids theirs

    def keep_dtype(tensor: Tensor) -> Tensor:
        moved = fn(tensor)
        # Cast from the original: the way back from a narrower dtype would have lost bits.
        return tensor.to(moved.device) if id(tensor) in kept and moved.dtype != tensor.dtype else moved

    return keep_dtype
