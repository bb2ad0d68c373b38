"""Inventory of the quantized weights of a model, linear layers and experts: names, shapes, tensors, facts.

Not here: their sizes in bytes (`quantize.footprint`).
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from svdq_hf.format.names import WeightName
from svdq_hf.format.parts import PARTS
from svdq_hf.nn.experts import SVDQExperts
from svdq_hf.nn.linear import SVDQLinear


class Packed(NamedTuple):
    """A quantized weight of a model, or a stack of them.

    Attributes:
        stored: its name and shape.
        parts: the model's own tensors of a weight `[out, in]`, or `[experts, out, in]`, by part.
        facts: what was measured while quantizing, by name.
    """

    stored: WeightName
    parts: dict[str, Tensor]
    facts: dict[str, float]


def packed_weights(model: nn.Module) -> Iterator[Packed]:
    """All quantized weights of a model; their parts are the model's own tensors."""
    for name, layer in svdq_layers(model):
        parts = {part: tensor for part in PARTS if (tensor := getattr(layer, part)) is not None}
        yield Packed(WeightName(name, layer.shape), parts, layer.facts)
    for name, experts in svdq_experts(model):
        for own in experts.stored():
            parts = {p: tensor for p in PARTS if (tensor := getattr(experts, own.key(p))) is not None}
            yield Packed(WeightName(f"{name}.{own.name}", own.shape), parts, experts.facts[own.name])


def layer_facts(model: nn.Module, names: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Shape and measured facts of each quantized weight, by its name in files.

    Args:
        model: any module.
        names: name in files by name in the model.
    """
    return {
        names[stored.name]: {"shape": list(stored.shape), **facts}
        for stored, _, facts in packed_weights(model)
    }


def svdq_experts(model: nn.Module) -> Iterator[tuple[str, SVDQExperts]]:
    """The quantized experts of a model, with their names."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, SVDQExperts))


def svdq_layers(model: nn.Module) -> Iterator[tuple[str, SVDQLinear]]:
    """The quantized layers of a model, with their names."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, SVDQLinear))
