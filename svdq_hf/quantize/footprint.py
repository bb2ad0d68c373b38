"""Footprint of a quantized model or folder: bytes, bits per weight, share kept in FP32.

From a folder, only the headers of its safetensors files are read. The facts measured while
quantizing are stored in that header (`METADATA_KEY`), so they survive every save and every copy. Not here:
estimates before a run (`checkpoint.estimate`).
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from svdq_hf.core.arguments import checked_arguments
from svdq_hf.core.packing import BLOCK
from svdq_hf.format.files import open_tensors, weight_files
from svdq_hf.format.metadata import numbers, stored_facts
from svdq_hf.format.names import part_key, weight_of_part
from svdq_hf.format.parts import ALL_PARTS, OPTIONAL, SUBSPACE_PARTS
from svdq_hf.nn.inventory import packed_weights
from svdq_hf.quantize.dense_tensors import DenseTensor, dense_tensors, stored_dense_tensors
from svdq_hf.quantize.footprint_text import as_html, as_text, megabytes

_ITEM_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "U32": 4, "BF16": 2, "F16": 2, "I16": 2}


class _Entry(NamedTuple):
    """A tensor in a file's header."""

    shape: list[int]
    bytes: int
    dtype: str


@dataclass(frozen=True)
class LayerFootprint:
    """One quantized layer, or one matrix of fused experts.

    Attributes:
        name: of the weight.
        out: rows.
        in_features: columns.
        k: salient weights of each matrix.
        stored_bytes: of all parts, without the bias; of all experts.
        facts: what was measured while quantizing, by name.
        experts: number of experts; None: a single matrix.
    """

    name: str
    out: int
    in_features: int
    k: int
    stored_bytes: int
    facts: Mapping[str, float] = field(default_factory=dict)
    experts: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """`(out, in)`, or `(experts, out, in)`."""
        matrix = (self.out, self.in_features)
        return matrix if self.experts is None else (self.experts, *matrix)

    @property
    def weights(self) -> int:
        """Number of weights, of all experts."""
        return math.prod(self.shape)

    @property
    def salient(self) -> int:
        """Number of weights in FP32, of all experts."""
        return self.k * (1 if self.experts is None else self.experts)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits over weights, everything counted but the bias."""
        return 8 * self.stored_bytes / self.weights


@dataclass(frozen=True, repr=False)
class Footprint:
    """Sizes of a whole model; printed it is a table of about ten lines, the totals first.

    Attributes:
        layers: the quantized layers.
        dense_bytes: bytes of everything else.
        dense_weights: numbers in everything else.
        dense: the tensors that everything else is made of, the largest first.
    """

    layers: list[LayerFootprint]
    dense_bytes: int
    dense_weights: int = field(default=0, compare=False)
    dense: tuple[DenseTensor, ...] = field(default=(), compare=False)

    @property
    def weights(self) -> int:
        """Number of weights in quantized layers."""
        return sum(layer.weights for layer in self.layers)

    @property
    def quantized_bytes(self) -> int:
        """Stored bytes of the quantized layers, without biases."""
        return sum(layer.stored_bytes for layer in self.layers)

    @property
    def total_bytes(self) -> int:
        """Stored bytes of the model."""
        return self.quantized_bytes + self.dense_bytes

    @property
    def bits_per_weight(self) -> float:
        """Mean over the weights in quantized layers; 0 where there are none."""
        return 8 * self.quantized_bytes / self.weights if self.weights else 0.0

    @property
    def salient_share(self) -> float:
        """Share of the weights in quantized layers that stay in FP32."""
        return sum(layer.salient for layer in self.layers) / self.weights if self.weights else 0.0

    def __str__(self) -> str:
        return as_text(self)

    def __repr__(self) -> str:
        size, bits = megabytes(self.total_bytes), self.bits_per_weight
        return f"<Footprint: {len(self.layers)} layers, {bits:.3f} bits per weight, {size}>"

    def _repr_html_(self) -> str:
        return as_html(self)

    def to_dict(self) -> dict[str, Any]:
        """Totals and layers, in types that JSON has."""
        totals = {
            "bits_per_weight": self.bits_per_weight,
            "salient_share": self.salient_share,
            "weights": self.weights,
            "quantized_bytes": self.quantized_bytes,
            "dense_bytes": self.dense_bytes,
            "total_bytes": self.total_bytes,
        }
        layers = {
            layer.name: {
                "shape": list(layer.shape),
                "k": layer.k,
                "bits_per_weight": layer.bits_per_weight,
                **layer.facts,
            }
            for layer in self.layers
        }
        return {"totals": totals, "layers": layers}


@checked_arguments(model="of a folder it is read_footprint(folder)")
def footprint(model: nn.Module) -> Footprint:
    """The footprint of a quantized model in memory (parameters and persistent buffers, each once).

    Args:
        model: the model.

    Raises:
        TypeError: an argument is of a wrong type (`WrongKind`, which is a ValueError as well).
        ValueError: `model` is no module but, for instance, a folder.
    """
    layers = []
    counted: set[int] = set()
    for (name, shape), parts, facts in sorted(
        packed_weights(model), key=lambda one: _natural(one.stored.name)
    ):
        counted.update(map(id, parts.values()))
        size = sum(tensor.nbytes for tensor in parts.values())
        *experts, out, in_features = shape
        k = parts["salient_values"].shape[-1]
        count = experts[0] if experts else None
        layers.append(LayerFootprint(name, out, in_features, k, size, facts, count))
    names: dict[int, str] = {}
    rest: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in counted and names.setdefault(id(tensor), name) == name:
            rest[name] = tensor
    sizes = sum(one.nbytes for one in rest.values()), sum(one.numel() for one in rest.values())
    return Footprint(layers, *sizes, dense_tensors(model, rest))


@checked_arguments(folder="of a model in memory it is footprint(model)")
def read_footprint(folder: str | Path) -> Footprint:
    """The footprint of a saved model, from the headers of its files alone.

    Args:
        folder: of the model.

    Raises:
        TypeError: an argument is of a wrong type (`WrongKind`, which is a ValueError as well).
        ValueError: it is no folder, has no safetensors file, one cannot be read, or none holds a quantized
            layer.
    """
    files = weight_files(folder)
    try:
        tensors = {name: entry for file in files for name, entry in _header(file).items()}
        facts = stored_facts(files)
    except OSError as error:
        raise ValueError(f"{folder}: a safetensors file cannot be read: {error}") from error
    names = dict(found for name in tensors if (found := weight_of_part(name)) is not None)
    if not names:
        raise ValueError(
            f"{folder}: no layer in these files is quantized by svdq: `svdq quantize` makes such a folder"
        )
    layers = [_stored_layer(name, names[name], tensors, facts) for name in sorted(names, key=_natural)]
    quantized = {
        part_key(name, part, stacked=stacked) for name, stacked in names.items() for part in ALL_PARTS
    }
    dense = {name: entry for name, entry in tensors.items() if name not in quantized}
    sizes = sum(one.bytes for one in dense.values()), sum(math.prod(one.shape) for one in dense.values())
    rest = {name: (one.bytes, one.dtype) for name, one in dense.items()}
    return Footprint(layers, *sizes, stored_dense_tensors(folder, rest))


def _stored_layer(
    name: str,
    stacked: bool,
    tensors: Mapping[str, _Entry],
    facts: Mapping[str, dict[str, Any]],
) -> LayerFootprint:
    keys = {part: part_key(name, part, stacked=stacked) for part in ALL_PARTS}
    there = {part: tensors[key].bytes for part, key in keys.items() if key in tensors}
    may_lack = (*OPTIONAL, *SUBSPACE_PARTS)
    missing = [part for part in ALL_PARTS if part not in there and part not in may_lack]
    if missing:
        raise ValueError(f"{name}: {', '.join(missing)} is missing")
    size = sum(there.values())
    shapes = {part: tensors[keys[part]].shape for part in ("weight", "salient_values")}
    if stacked and any(len(shape) < 2 for shape in shapes.values()):
        raise ValueError(f"{name}: {shapes} are no stacks of experts")
    experts = shapes["weight"][0] if stacked else None
    packed, k = (shape[1:] if stacked else shape for shape in shapes.values())
    fact = facts.get(name, {})
    # Without the fact, the width is known only up to the padding of a row to whole blocks of 64.
    if len(packed) not in (2, 3) or len(k) != 1 or 0 in shapes["weight"]:
        raise ValueError(f"{name}: weight is {packed} and salient_values {k}, not packed rows and [k]")
    in_features = 2 * packed[1] if len(packed) == 2 else BLOCK * packed[1]
    shape = fact.get("shape")
    width = shape[-1] if isinstance(shape, list) and len(shape) == (3 if stacked else 2) else None
    if type(width) is int and 0 < width <= in_features:
        in_features = width
    return LayerFootprint(name, packed[0], in_features, k[0], size, numbers(fact), experts)


def _header(file: Path) -> dict[str, _Entry]:
    """Each tensor of a file."""
    with open_tensors(file) as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118  # not a dict
        return {name: _entry(part.get_shape(), part.get_dtype()) for name, part in slices.items()}


def _entry(shape: list[int], dtype: str) -> _Entry:
    return _Entry(shape, math.prod(shape) * _ITEM_BYTES.get(dtype, 1), dtype)


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Sort key that puts layer 2 before layer 10."""
    return [(0, int(p), "") if p.isdecimal() else (1, 0, p) for p in name.split(".")]


def dense_bytes(layers: Iterable[LayerFootprint], dtype: torch.dtype = torch.float32) -> int:
    """Bytes that the weights of these layers would take in `dtype`."""
    return sum(layer.weights for layer in layers) * dtype.itemsize
