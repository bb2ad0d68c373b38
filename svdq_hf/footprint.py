"""What a quantized model weighs: bytes, bits per weight, share kept; of a model or of a folder.

Read from a folder, this opens only the headers of its safetensors files. The facts measured while
quantizing travel in that header (`METADATA_KEY`), so they survive every save and every copy.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from svdq_hf.convert import svdq_layers
from svdq_hf.decompose import OPTIONAL, PARTS
from svdq_hf.packing import BLOCK

METADATA_KEY = "svdq_layers"
_ITEM_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "U32": 4, "BF16": 2, "F16": 2, "I16": 2}


@dataclass(frozen=True)
class LayerFootprint:
    """One quantized layer: `[out, in]`, salient weights, stored bytes without the bias, facts."""

    name: str
    out: int
    in_features: int
    k: int
    stored_bytes: int
    facts: Mapping[str, float] = field(default_factory=dict)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits over weights, everything counted but the bias."""
        return 8 * self.stored_bytes / (self.out * self.in_features)


@dataclass(frozen=True)
class Footprint:
    """A whole model: its quantized layers, and the bytes of everything that stays dense."""

    layers: list[LayerFootprint]
    dense_bytes: int

    @property
    def weights(self) -> int:
        """Weights in quantized layers."""
        return sum(layer.out * layer.in_features for layer in self.layers)

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
        """Share of those weights that stay in FP32."""
        return sum(layer.k for layer in self.layers) / self.weights if self.weights else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON can hold it."""
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
                "shape": [layer.out, layer.in_features],
                "k": layer.k,
                "bits_per_weight": layer.bits_per_weight,
                **layer.facts,
            }
            for layer in self.layers
        }
        return {"totals": totals, "layers": layers}


def footprint(model: nn.Module) -> Footprint:
    """The footprint of a quantized model in memory (parameters and persistent buffers, each once).

    Raises:
        ValueError: `model` is no module, but a folder, say.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model is {model!r}: of a folder it is read_footprint(folder)")
    layers = []
    counted: set[int] = set()
    for name, layer in sorted(svdq_layers(model), key=lambda named: _natural(named[0])):
        stored = [part for name in PARTS if (part := getattr(layer, name)) is not None]
        counted.update(map(id, stored))
        size = sum(tensor.nbytes for tensor in stored)
        k = layer.salient_values.numel()
        layers.append(LayerFootprint(name, layer.out_features, layer.in_features, k, size, layer.facts))
    rest = {id(tensor): tensor.nbytes for tensor in model.state_dict(keep_vars=True).values()}
    return Footprint(layers, sum(size for key, size in rest.items() if key not in counted))


def file_metadata(model: nn.Module, names: Mapping[str, str]) -> dict[str, str]:
    """What `save_pretrained` writes into the header of each safetensors file.

    names: what each layer is called in files, by its name in the model.
    """
    layers = {
        names[name]: {"shape": [layer.out_features, layer.in_features], **layer.facts}
        for name, layer in svdq_layers(model)
    }
    return {METADATA_KEY: json.dumps(layers)}


def stored_facts(files: Iterable[str | Path]) -> dict[str, dict[str, Any]]:
    """Shape and facts by layer name, as `file_metadata` left them; empty where it did not."""
    for file in files:
        with safe_open(file, framework="pt") as opened:
            text = (opened.metadata() or {}).get(METADATA_KEY)
        try:
            layers = json.loads(text) if text is not None else None
        except (ValueError, RecursionError):
            layers = None
        if isinstance(layers, dict):
            return {name: facts for name, facts in layers.items() if isinstance(facts, dict)}
    return {}


def numbers(facts: Mapping[str, Any]) -> dict[str, float]:
    """Those of `facts` that are finite numbers: a stranger's header can hold anything."""
    return {
        name: float(value)
        for name, value in facts.items()
        if type(value) in (int, float) and abs(value) < 2**53  # NaN is not below, nor is infinity
    }


def read_footprint(folder: str | Path) -> Footprint:
    """The footprint of a saved model, from the headers of its files alone.

    Raises:
        ValueError: no safetensors file is there, one cannot be read, or none holds a quantized layer.
    """
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder}: no *.safetensors file is there")
    try:
        tensors = {name: entry for file in files for name, entry in _header(file).items()}
        facts = stored_facts(files)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{folder}: a safetensors file cannot be read: {error}") from error
    names = [name.removesuffix(".salient_rows") for name in tensors if name.endswith(".salient_rows")]
    if not names:
        raise ValueError(f"{folder}: no layer in these files is quantized by svdq")
    layers = [_stored_layer(name, tensors, facts) for name in sorted(names, key=_natural)]
    quantized = {f"{name}.{part}" for name in names for part in PARTS}
    dense = sum(size for name, (_, size) in tensors.items() if name not in quantized)
    return Footprint(layers, dense)


def _stored_layer(
    name: str, tensors: Mapping[str, tuple[list[int], int]], facts: Mapping[str, dict[str, Any]]
) -> LayerFootprint:
    there = {part: tensors[f"{name}.{part}"][1] for part in PARTS if f"{name}.{part}" in tensors}
    missing = [part for part in PARTS if part not in there and part not in OPTIONAL]
    if missing:
        raise ValueError(f"{name}: {', '.join(missing)} is missing")
    size = sum(there.values())
    packed = tensors[f"{name}.weight"][0]
    fact = facts.get(name, {})
    shape = fact.get("shape")
    # Without the fact, the width is known only up to the padding of a row to whole blocks of 64.
    k = tensors[f"{name}.salient_values"][0]
    if len(packed) not in (2, 3) or len(k) != 1 or 0 in packed:
        raise ValueError(f"{name}: weight is {packed} and salient_values {k}, not packed rows and [k]")
    in_features = 2 * packed[1] if len(packed) == 2 else BLOCK * packed[1]
    if isinstance(shape, list) and len(shape) == 2 and type(shape[1]) is int and 0 < shape[1] <= in_features:
        in_features = shape[1]
    return LayerFootprint(name, packed[0], in_features, k[0], size, numbers(fact))


def _header(file: Path) -> dict[str, tuple[list[int], int]]:
    """Shape and bytes of each tensor of a file."""
    with safe_open(file, framework="pt") as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118  # not a dict
        return {
            name: (part.get_shape(), math.prod(part.get_shape()) * _ITEM_BYTES.get(part.get_dtype(), 1))
            for name, part in slices.items()
        }


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Sort key that puts layer 2 before layer 10."""
    return [(0, int(p), "") if p.isdecimal() else (1, 0, p) for p in name.split(".")]


def dense_bytes(layers: Iterable[LayerFootprint], dtype: torch.dtype = torch.float32) -> int:
    """Bytes that these layers' weights would take in `dtype`."""
    return sum(layer.out * layer.in_features for layer in layers) * dtype.itemsize
