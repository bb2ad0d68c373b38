"""Inventory of the quantized weights of a model, linear layers and experts: names, shapes, tensors, facts.

Not here: their sizes in bytes (`quantize.footprint`).
"""

import math
from collections.abc import Container, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from svdq_hf.format.names import WeightName
from svdq_hf.format.packed_codes import PackedCodes
from svdq_hf.format.parts import ALL_PARTS, PARTS
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
        parts = {part: own for part in ALL_PARTS if (own := getattr(layer, part, None)) is not None}
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


def number_of_weights(model: nn.Module) -> int:
    """The weights of a model, each once: of a quantized layer as many as it stands for, not its bytes.

    Args:
        model: any module.

    >>> number_of_weights(nn.Sequential(SVDQLinear(64, 8), nn.Linear(8, 2)))
    538
    """
    return sum(one.numel() for one in model.parameters()) + uncounted_weights(model)


def uncounted_weights(model: nn.Module, *, without: Container[int] = ()) -> int:
    """What to add to the number of elements of a model's parameters for the number of its weights.

    Packed bytes are fewer than the weights they stand for, and salient values are among these.

    Args:
        model: any module.
        without: ids of packed codes whose layer is not to count at all.
    """
    total = 0
    for stored, parts, _ in packed_weights(model):
        held = [parts[one] for one in ("weight", "salient_values", "subspace_weight") if one in parts]
        total -= sum(part.numel() for part in held if isinstance(part, nn.Parameter))
        total += 0 if id(parts["weight"]) in without else math.prod(stored.shape)
    return total


def name_packed_codes(model: nn.Module) -> None:
    """Let the packed codes of a model say of which layer they are, when somebody wants them to train.

    Args:
        model: any module; its packed parameters become `PackedCodes` that share their memory.
    """
    for stored, parts, _ in packed_weights(model):
        if isinstance(parts["weight"], nn.Parameter) and not hasattr(parts["weight"], "full_tensor"):
            codes = PackedCodes(parts["weight"].data)
            codes.__dict__.update(parts["weight"].__dict__, layer=stored.name)
            path, _, leaf = stored.key("weight").rpartition(".")
            model.get_submodule(path)._parameters[leaf] = codes
