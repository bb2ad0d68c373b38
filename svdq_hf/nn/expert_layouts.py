"""Layouts of fused experts: which classes can be quantized, and how each stores its two matrices.

Families whose class uses transformers' experts interface (the decorator that adds `has_gate`,
`is_transposed` and others) need not be known by name; two that do not use it are. Not here: the quantized
module (`nn.experts`).
"""

from typing import NamedTuple

from torch import nn

from svdq_hf.format.names import WeightName


class Layout(NamedTuple):
    """How a class stores and calls its experts.

    Attributes:
        matrices: names of the two parameters, in the order they are applied.
        transposed: whether they are `[experts, in, out]`.
        routed: whether it is called with indices and weights of the top k experts of each token; otherwise
            with equally many tokens for each expert, zero where the expert was not chosen.
    """

    matrices: tuple[str, str] = ("gate_up_proj", "down_proj")
    transposed: bool = False
    routed: bool = True


_BY_NAME = {"Llama4TextExperts": Layout(transposed=True, routed=False), "Step3p7Experts": Layout()}
_INTERFACE = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "_apply_gate")
"""Attributes that transformers' decorator `use_experts_implementation` gives to a class."""


def layout_of(module: nn.Module) -> Layout | None:
    """The layout of fused experts that can be quantized; None for any other module."""
    layout = _BY_NAME.get(type(module).__name__)
    if layout is None and all(hasattr(module, name) for name in _INTERFACE):
        first = "gate_up_proj" if module.has_gate else "up_proj"
        layout = Layout((first, "down_proj"), bool(module.is_transposed))
    return layout if layout is not None and _fits(module, layout) else None


def _fits(module: nn.Module, layout: Layout) -> bool:
    """Whether a module has the layout's two matrices and no others, with equally many experts."""
    stacks = {name: p for name, p in module.named_parameters(recurse=False) if p.ndim == 3}
    counts = {parameter.shape[0] for parameter in stacks.values()}
    floats = all(parameter.is_floating_point() for parameter in stacks.values())
    return stacks.keys() == set(layout.matrices) and len(counts) == 1 and floats


def unknown_experts(module: nn.Module) -> bool:
    """Whether a module looks like fused experts of an unknown class."""
    fused = any(parameter.ndim > 1 for parameter in module.parameters(recurse=False))
    return fused and "expert" in type(module).__name__.lower() and layout_of(module) is None


def stacks_of(name: str, module: nn.Module) -> list[WeightName]:
    """The two stacks of a module of fused experts; of another module none.

    Args:
        name: of the module.
        module: the dense module.
    """
    layout = layout_of(module)
    if layout is None:
        return []
    shapes = {matrix: tuple(getattr(module, matrix).shape) for matrix in layout.matrices}
    return [
        WeightName(f"{name}.{matrix}", (count, b, a) if layout.transposed else (count, a, b))
        for matrix, (count, a, b) in shapes.items()
    ]
