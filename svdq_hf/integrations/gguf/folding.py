"""Column scales folded into what comes before a matrix, where that is exact.

`W x = (W / c) (c x)`: with a scale for each column a large column does not decide its blocks' scales, and
where x comes from a norm's weights or from the rows of another matrix, they take c. Pairs that do:

* q, k, v after their norm, gate and up after theirs: all that read the norm share one scale;
* down after up, whose rows meet it one by one: `down (act(gate x) * (up x))`;
* the output of attention after v: attention mixes tokens, not columns. Heads that share values share scales.

That needs to know the model's graph, which a GGUF file does not hold: pairs are found in those architectures
of llama.cpp (its `src/models`) whose layers are read here to be so, and only in a layer that has no tensor
but known ones. Elsewhere nothing is folded. Not here: what the scales are good for (`core.column_scale`).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from svdq_hf.core.column_scale import column_scale
from svdq_hf.integrations.gguf.model_file import ModelFile

ARCHITECTURES = (
    "ernie4_5",
    "exaone",
    "gemma",
    "gemma2",
    "gemma3",
    "granite",
    "internlm2",
    "llama",
    "mistral3",
    "qwen2",
    "qwen3",
    "smollm3",
)
"""Those whose graph has each norm read by q, k, v alone, or by gate and up alone, and a gated MLP."""

KNOWN = frozenset(
    f"{name}.{part}"
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    for part in ("weight", "bias")
) | frozenset(
    f"{name}.weight"
    for name in (
        "attn_norm",
        "attn_q_norm",
        "attn_k_norm",
        "post_attention_norm",
        "ffn_norm",
        "post_ffw_norm",
    )
)
"""The tensors of such a layer; one more, such as a router or a sink, could read a norm or follow v."""

LARGEST = 256.0
"""A scale, or its reciprocal, is no larger: what is folded stays well within float16."""


@dataclass(frozen=True)
class Heads:
    """How many heads of queries there are, and of keys and values."""

    queries: int
    values: int


@dataclass(frozen=True)
class Fold:
    """Matrices whose columns share a scale, and what takes it.

    Attributes:
        readers: names of the matrices `[out, in]` that are divided by it.
        taken_by: names of the tensors whose entries, or rows, are multiplied by it.
        heads: for the output of attention.
    """

    readers: tuple[str, ...]
    taken_by: tuple[str, ...]
    heads: Heads | None = None


def find_folds(model: ModelFile) -> list[Fold]:
    """The pairs of a model's layers that a column scale can be folded into exactly.

    Args:
        model: the file.

    Returns:
        None at all for a model of another architecture.
    """
    if model.architecture not in ARCHITECTURES:
        return []
    layers: dict[str, set[str]] = {}
    for name in model.tensors:
        if name.startswith("blk."):
            _, layer, part = name.split(".", 2)
            layers.setdefault(f"blk.{layer}.", set()).add(part)
    heads = _heads(model)
    return [
        fold for layer, parts in layers.items() if parts <= KNOWN for fold in _of_layer(model, layer, heads)
    ]


def _of_layer(model: ModelFile, layer: str, heads: Heads | None) -> Iterator[Fold]:
    def names(*parts: str) -> tuple[str, ...]:
        return tuple(f"{layer}{part}" for part in parts if f"{layer}{part}" in model.tensors)

    attention = names("attn_q.weight", "attn_k.weight", "attn_v.weight")
    mlp = names("ffn_gate.weight", "ffn_up.weight")
    for norm, readers, all_of_them in (("attn_norm", attention, 3), ("ffn_norm", mlp, 2)):
        weight = names(f"{norm}.weight")
        if weight and len(readers) == all_of_them and _is_float32(model, weight[0]):
            yield Fold(readers, weight)
    down, output = names("ffn_down.weight"), names("attn_output.weight")
    if down and len(mlp) == 2:
        yield Fold(down, names("ffn_up.weight", "ffn_up.bias"))
    if output and len(attention) == 3 and heads is not None and _fits(model, attention[2], output[0], heads):
        yield Fold(output, names("attn_v.weight", "attn_v.bias"), heads)


def _is_float32(model: ModelFile, name: str) -> bool:
    """Whether what takes a scale is precise enough for it; llama.cpp's converter leaves all norms so."""
    return bool(model.tensors[name].tensor_type.name == "F32")


def _heads(model: ModelFile) -> Heads | None:
    """The heads of all layers; None where layers differ in them."""
    queries = model.count("attention.head_count")
    values = model.count("attention.head_count_kv", queries if isinstance(queries, int) else 0)
    if isinstance(queries, list) or isinstance(values, list) or not values or queries % values:
        return None
    return Heads(queries, values)


def _fits(model: ModelFile, value: str, output: str, heads: Heads) -> bool:
    """Whether the shapes are those of heads of one size."""
    rows, columns = model.shape(value)[0], model.shape(output)[1]
    return rows % heads.values == 0 and columns == rows // heads.values * heads.queries


def scale_of(model: ModelFile, fold: Fold) -> tuple[Tensor, Tensor]:
    """The column scale of a pair.

    Args:
        model: the file.
        fold: the pair.

    Returns:
        What the readers' columns are divided by, `[in]`, and what the rows before are multiplied by,
        `[rows]`: the same, but for heads that share values.
    """
    weights = torch.cat([model.weight(name) for name in fold.readers])
    if fold.heads is None:
        scale = _limited(column_scale(weights))
        return scale, scale
    values, each = fold.heads.values, fold.heads.queries // fold.heads.values
    split = weights.view(len(weights), values, each, -1)  # [out, values, heads of each, size]
    shared = _limited(column_scale(split.transpose(1, 2).flatten(2).flatten(0, 1)))
    return shared.view(values, 1, -1).expand(-1, each, -1).reshape(-1), shared


def _limited(scale: Tensor) -> Tensor:
    return scale.float().clamp(1 / LARGEST, LARGEST)
