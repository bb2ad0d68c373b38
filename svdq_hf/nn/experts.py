"""SVDQExperts: the fused experts of a layer, each expert's matrices quantized like a linear layer's.

transformers keeps all experts of a layer in two parameters of three dimensions. Their class knows the rest
(the gate, the activation, biases, a norm), so the module here takes over everything of the dense one except
these two, and uses its class for the gate. Whichever implementation the model's config names ("grouped_mm",
"eager"), packed experts run the one here. Not here: which classes are known (`nn.expert_layouts`), and the
product (`kernels.experts_op`).
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from svdq_hf.format.decode import reconstruct
from svdq_hf.format.names import WeightName
from svdq_hf.format.parts import PARTS, Scheme, StoredWeight
from svdq_hf.kernels import transforms
from svdq_hf.kernels.experts_op import expert_linear
from svdq_hf.kernels.positions import check_positions
from svdq_hf.nn.expert_layouts import layout_of, stacks_of
from svdq_hf.nn.linear import FLOAT_PARTS, FLOATS_FIRST, as_computed, keeping_dtypes, leaf_of_a_trace


class SVDQExperts(nn.Module):
    """The experts of one layer; only those that a token has chosen are decoded.

    For each of the two matrices the parts of all experts are stacked (`[experts, ...]`, see `stack_specs`),
    under the names of `WeightName`. As in `SVDQLinear`, the salient values are a parameter, packed codes a
    frozen one, the rest buffers; they are created empty.

    Args:
        dense: the module that this one replaces; it is left as it is.
        scheme: how each matrix is stored.
        device: of the empty parts.
        compute_dtype: dtype of the products; None: that of the input.

    Raises:
        ValueError: `dense` is no class of fused experts that can be quantized.
    """

    family: Any
    act_fn: Callable[[Tensor], Tensor]
    post_expert_norm: Callable[[Tensor], Tensor]

    def __init__(
        self,
        dense: nn.Module,
        scheme: Scheme | None = None,
        *,
        device: torch.device | str | None = None,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        layout = layout_of(dense)
        if layout is None:
            raise ValueError(f"{type(dense).__name__} is no class of fused experts that can be quantized")
        take_over(self, dense, layout.matrices)
        self.family, self.layout = type(dense), layout
        self.scheme, self.compute_dtype = scheme or Scheme(), compute_dtype
        self.stacks = {
            matrix: stored.shape for matrix, stored in zip(layout.matrices, stacks_of("", dense), strict=True)
        }
        self.facts: dict[str, dict[str, float]] = {matrix: {} for matrix in self.stacks}
        """What was measured while quantizing, by matrix and name."""
        for stored in self.stored():
            specs = stored.specs(self.scheme)
            for part in FLOATS_FIRST:
                empty = None
                if part in specs:
                    empty = torch.empty(specs[part].shape, dtype=specs[part].dtype, device=device)
                self._put(stored.key(part), part, empty, trained=getattr(dense, stored.name).requires_grad)

    def _put(self, key: str, part: str, tensor: Tensor | None, *, trained: bool) -> None:
        if tensor is not None and part in ("weight", "salient_values"):
            trained = trained and part == "salient_values"
            self.register_parameter(key, nn.Parameter(tensor, requires_grad=trained))
        else:
            self.register_buffer(key, tensor)

    def stored(self) -> list[WeightName]:
        """Names and shapes of the two stacks, without the module's own name."""
        return [WeightName(matrix, shape) for matrix, shape in self.stacks.items()]

    def stack(self, matrix: str) -> dict[str, Tensor]:
        """The stored tensors of one matrix, by part.

        Args:
            matrix: its name.

        Returns:
            Tensors `[experts, ...]`, see `stack_specs`.
        """
        stored = WeightName(matrix, self.stacks[matrix])
        return {part: getattr(self, stored.key(part)).detach() for part in stored.specs(self.scheme)}

    def parts(self) -> dict[str, Tensor]:
        """All stored tensors `[experts, ...]`, by their names in this module."""
        return {
            stored.key(part): tensor
            for stored in self.stored()
            for part, tensor in self.stack(stored.name).items()
        }

    def load_stack(self, matrix: str, parts: Mapping[str, Tensor]) -> None:
        """Put the stacked parts of one matrix into the module.

        Args:
            matrix: its name.
            parts: tensors `[experts, ...]` by part, see `stack_specs`.
        """
        stored = WeightName(matrix, self.stacks[matrix])
        for part, tensor in parts.items():
            current = getattr(self, stored.key(part))
            if isinstance(current, nn.Parameter):
                tensor = nn.Parameter(tensor, requires_grad=current.requires_grad)
            setattr(self, stored.key(part), tensor)

    def dense_shape(self, matrix: str) -> tuple[int, ...]:
        """The shape of one matrix of all experts in the dense class."""
        return WeightName(matrix, self.stacks[matrix]).dense_shape(transposed=self.layout.transposed)

    def dequantize(self, matrix: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """One matrix of all experts, as the dense class stores it.

        Args:
            matrix: its name.
            dtype: of the result.

        Returns:
            `[experts, out, in]`, or `[experts, in, out]` where the layout is transposed.

        Raises:
            ValueError: a salient position that was loaded is out of range or out of order.
        """
        parts, (_, out, in_features) = self.stack(matrix), self.stacks[matrix]
        dense = torch.empty(self.dense_shape(matrix), dtype=dtype, device=parts["weight"].device)
        for expert, place in enumerate(dense):
            one = {name: part[expert] for name, part in parts.items()}
            check_positions(one["salient_rows"], one["salient_columns"], out, in_features)
            weight = reconstruct(one, in_features, self.scheme)
            place.copy_(weight.T if self.layout.transposed else weight)
        return dense

    def forward(
        self, hidden_states: Tensor, top_k_index: Tensor | None = None, top_k_weights: Tensor | None = None
    ) -> Tensor:
        """The experts' sum for each token, as the dense class computes it.

        Args:
            hidden_states: `[tokens, hidden]`.
            top_k_index: experts chosen by each token, `[tokens, k]`; None: tokens are sorted by expert,
                equally many for each.
            top_k_weights: their weights, `[tokens, k]`.

        Returns:
            `[tokens, hidden]`.
        """
        if isinstance(hidden_states, Proxy):
            return leaf_of_a_trace(self, hidden_states, top_k_index, top_k_weights)
        transforms.refuse(f"quantized experts ({self.family.__name__})")
        experts = next(iter(self.stacks.values()))[0]
        if top_k_index is None or top_k_weights is None:  # tokens lie by expert, in equal numbers
            each = torch.arange(1, experts + 1, device=hidden_states.device)
            x = hidden_states.reshape(-1, hidden_states.shape[-1])
            return self._experts(x, each * (x.shape[0] // experts), None)
        chosen, order = top_k_index.reshape(-1).sort(stable=True)
        last = torch.arange(experts, dtype=chosen.dtype, device=chosen.device)
        ends = torch.searchsorted(chosen, last, right=True)
        y = self._experts(hidden_states[order // top_k_index.shape[1]], ends, chosen.clamp(max=experts - 1))
        # An index beyond the experts is nobody's token, as in the dense class.
        weights = top_k_weights.reshape(-1)[order].masked_fill(chosen >= experts, 0)
        y = (y * weights.unsqueeze(1))[order.argsort()]
        return y.view(*top_k_index.shape, y.shape[1]).sum(1).to(hidden_states.dtype)

    def _experts(self, x: Tensor, ends: Tensor, chosen: Tensor | None) -> Tensor:
        """The experts themselves: x `[n, hidden]`, sorted by expert, up, through the gate, and down."""
        first, second = self.layout.matrices
        y = self._product(first, x, ends, chosen)
        if not self.layout.routed:
            gate, up = y.chunk(2, dim=-1)
            y = up * self.act_fn(gate)
        else:
            y = self.family._apply_gate(self, y) if getattr(self, "has_gate", True) else self.act_fn(y)
        y = self._product(second, y, ends, chosen)
        return self.post_expert_norm(y) if getattr(self, "has_post_expert_norm", False) else y

    def _product(self, matrix: str, x: Tensor, ends: Tensor, chosen: Tensor | None) -> Tensor:
        stored = WeightName(matrix, self.stacks[matrix])
        in_features = stored.shape[2]
        x, result = as_computed(x, self.compute_dtype)
        weight = StoredWeight(*(getattr(self, stored.key(part)) for part in PARTS))
        group = self.scheme.grid.columns(in_features)
        y = expert_linear(x, *weight, ends, in_features, group, not self.layout.routed).to(result)
        bias = getattr(self, f"{matrix}_bias", None)
        return y if bias is None or chosen is None else y + bias[chosen].to(result)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SVDQExperts":
        parts = (getattr(self, stored.key(part), None) for stored in self.stored() for part in FLOAT_PARTS)
        super()._apply(keeping_dtypes(fn, parts), recurse)  # type: ignore[no-untyped-call]
        return self

    def extra_repr(self) -> str:
        shapes = (f"{matrix}={list(shape)}" for matrix, shape in self.stacks.items())
        values = [getattr(self, stored.key("salient_values")) for stored in self.stored()]
        text = f"{self.family.__name__}, {', '.join(shapes)}, k={[value.shape[1] for value in values]}"
        return f"{text}, group_size={self.scheme.grid.group_size}"


_OWN = ("family", "layout", "scheme", "compute_dtype", "stacks", "facts")
_NOT_TAKEN = {*vars(nn.Module()), *_OWN, "forward", "_hf_hook", "_old_forward"}
"""Attributes that `take_over` skips: those of every module, ours, and the hooks of accelerate."""


def take_over(module: nn.Module, other: nn.Module, without: Iterable[str]) -> None:
    """Give a module the attributes, tensors and submodules of another one.

    Args:
        module: changed in place.
        other: where they come from.
        without: names of tensors that are left out.
    """
    for name, value in vars(other).items():
        if name not in _NOT_TAKEN:
            setattr(module, name, value)
    for kind in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
        found = getattr(other, kind)
        kept = [name for name in found if name not in without]
        getattr(module, kind).update(kept if isinstance(found, set) else {name: found[name] for name in kept})
    module.training = other.training


def dense_experts(layer: SVDQExperts, dtype: torch.dtype) -> nn.Module:
    """The module of the family's own class that packed experts replace.

    Args:
        layer: the packed experts.
        dtype: of its matrices.
    """
    dense: nn.Module = layer.family.__new__(layer.family)
    nn.Module.__init__(dense)
    for matrix, shape in layer.stacks.items():
        values = getattr(layer, WeightName(matrix, shape).key("salient_values"))
        trains = values.requires_grad or values.numel() == 0
        dense.register_parameter(matrix, nn.Parameter(layer.dequantize(matrix, dtype), trains))
    take_over(dense, layer, without=[key for stored in layer.stored() for key in stored.all_keys()])
    for name, parameter in list(dense.named_parameters(recurse=False)):
        if name not in layer.stacks and parameter.is_floating_point():
            setattr(dense, name, nn.Parameter(parameter.detach().to(dtype), parameter.requires_grad))
    return dense
