"""Paths of the kernels that a model's quantized layers take, by shape and number of tokens, in words.

Not here: the choice itself (`kernels.backends`, `kernels.cpu`).
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from svdq_hf.kernels import cpu
from svdq_hf.kernels.native.library import AVX2, AVX512, PLAIN
from svdq_hf.nn.embedding import SVDQEmbedding
from svdq_hf.nn.inventory import svdq_layers
from svdq_hf.nn.linear import SVDQLinear

INSTRUCTIONS = {PLAIN: "plain C", AVX2: "AVX2", AVX512: "AVX-512"}
WAYS = {
    cpu.DECODED: "decodes the codes in registers",
    cpu.ROWS: "writes blocks of rows, multiplied by torch",
    cpu.BFLOAT16_ROWS: "writes blocks of rows in bfloat16, multiplied by torch on AMX",
}
REFERENCE = "plain torch: each call dequantizes the weight"
MISSING = {
    PLAIN: "this CPU has neither AVX2 with FMA nor AVX-512",
    AVX2: "this CPU has no AVX-512 (F, BW, VL, DQ)",
}
"""Why not the next faster path of the native library."""


@dataclass(frozen=True)
class KernelPath:
    """What computes the layers of one shape.

    Attributes:
        out: rows of the weight.
        in_features: columns.
        layers: how many layers have this shape, bits and group.
        bits: of a code.
        group: columns that share a scale.
        ways: by number of tokens, the path in words.
        why_not_better: reasons why faster paths are not taken, none twice.
    """

    out: int
    in_features: int
    layers: int
    bits: int
    group: int
    ways: dict[int, str]
    why_not_better: list[str]

    def to_dict(self) -> dict[str, Any]:
        """All fields, in types that JSON has."""
        return asdict(self)


def kernel_paths(
    model: nn.Module, tokens: Iterable[int], dtype: torch.dtype = torch.float32
) -> list[KernelPath]:
    """The paths of a model's quantized layers, the commonest shape first.

    Args:
        model: with quantized layers; one without gives an empty list.
        tokens: numbers of tokens in a call.
        dtype: of the activations.
    """
    layers = [one for _, one in svdq_layers(model) if not isinstance(one, SVDQEmbedding)]
    count = Counter(map(_sort, layers))
    first = {_sort(one): one for one in reversed(layers)}
    return [_path(first[sort], many, tuple(tokens), dtype) for sort, many in count.most_common()]


def _sort(layer: SVDQLinear) -> tuple[int, int, int, int, bool]:
    return layer.out_features, layer.in_features, layer.scheme.grid.bits, layer.group, layer.fast


def _path(layer: SVDQLinear, many: int, tokens: tuple[int, ...], dtype: torch.dtype) -> KernelPath:
    x = torch.empty(1, layer.in_features, dtype=dtype, device=layer.weight.device)
    taken, refused = layer.backend(x)
    computed = layer.compute_dtype or dtype
    ways = {count: _way(layer, taken, count, computed) for count in tokens}
    why = list(refused.values())
    best = cpu.chosen_path(False, layer.in_features)
    bits, group = layer.scheme.grid.bits, layer.group
    if taken == "native" and best in MISSING:
        why.append(MISSING[best])
    if taken == "native" and bits != 4 and best > AVX2:
        why.append("the kernels of 3 and 8 bits are AVX2's")
    return KernelPath(layer.out_features, layer.in_features, many, bits, group, ways, why)


def _way(layer: SVDQLinear, taken: str, tokens: int, dtype: torch.dtype) -> str:
    if taken != "native":
        return REFERENCE if taken == "reference" else taken
    path, bits = cpu.chosen_path(layer.fast, layer.in_features), layer.scheme.grid.bits
    if bits != 4:  # whose best kernels are AVX2's
        path = min(path, AVX2)
    best = INSTRUCTIONS.get(path, "AVX-512 with 16-bit activations (fast)")
    return f"{best}, {WAYS[cpu.way(tokens, dtype, path, cpu.has_amx(), bits)]}"
