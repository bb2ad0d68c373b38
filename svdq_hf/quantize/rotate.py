"""Rotation of a decoder in memory: other bases inside of it, the same function outside.

Three steps, exact but for rounding: the weights of RMSNorms are folded into the layers that read them, so
that a norm commutes with rotations; one orthogonal matrix for the whole model (U_A) goes into the embedding,
the readers and writers of the residual stream, and the head; one for each key and value head (U_B) into the
rows of the layer that makes the values and the columns of the one that reads them. A head that is tied to the
embedding gets a matrix of its own, since the last norm's weight is folded into it alone. Not here: which
bases (`quantize.bases`); the rotations at run time: of a layer's input by a Hadamard matrix (U_D:
`nn.integer_linear`), and of keys (U_C: a cache that rotates keeps that to itself).

Source: arXiv 2412.14363 (ResQ), section 3; folding after arXiv 2401.15024 (SliceGPT).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from svdq_hf.core.rounding import row_blocks
from svdq_hf.quantize.residual_stream import Block, Heads, ResidualStream
from svdq_hf.quantize.selection import dense_weight


@dataclass(frozen=True)
class Bases:
    """The new bases of a model, as orthogonal matrices whose columns are the new axes.

    Attributes:
        stream: U_A `[hidden, hidden]`, float64; None: the residual stream is left as it is.
        values: U_B by the name of the layer that makes the values: `[heads, size, size]`, float64.
    """

    stream: Tensor | None = None
    values: dict[str, Tensor] = field(default_factory=dict)


def fold_norms(model: nn.Module, stream: ResidualStream) -> None:
    """Fold the weights of a model's RMSNorms into the layers that read them; the head is untied for that.

    Args:
        model: changed in place.
        stream: what `find_stream` found.
    """
    _untie(model, stream)
    with torch.no_grad():
        for norm, readers in stream.reads:
            gain = dense_weight(model.get_submodule(norm))
            for weight in (dense_weight(model.get_submodule(name)) for name in readers):
                for rows, block in _blocks(weight):
                    weight[rows] = (block * (gain.double() + stream.offset)).to(weight.dtype)
            gain.fill_(1 - stream.offset)


def rotate(model: nn.Module, stream: ResidualStream, bases: Bases) -> None:
    """Change the bases of a model whose norms are folded.

    Args:
        model: changed in place; all arithmetic is in float64.
        stream: what `find_stream` found.
        bases: the new bases.
    """
    with torch.no_grad():
        if bases.stream is not None:
            _rotate_stream(model, stream, bases.stream)
        for block in stream.blocks:
            if block.heads is not None and block.heads.value in bases.values:
                _rotate_heads(model, block, block.heads, bases.values[block.heads.value])


def _rotate_stream(model: nn.Module, stream: ResidualStream, basis: Tensor) -> None:
    readers = [name for _, names in stream.reads for name in names]
    for name in (stream.embedding, *readers):
        _rotate_columns(dense_weight(model.get_submodule(name)), basis)
    for name in (block.writer for block in stream.blocks):
        layer = model.get_submodule(name)
        for tensor in (layer.weight, layer.bias):
            if isinstance(tensor, Tensor):
                tensor.copy_(basis.to(tensor.device).T @ tensor.double())


def _rotate_heads(model: nn.Module, block: Block, heads: Heads, basis: Tensor) -> None:
    """U_B of one attention block; query heads that share values share their basis."""
    value, reads = model.get_submodule(heads.value), dense_weight(model.get_submodule(block.writer))
    basis = basis.to(reads.device)
    for tensor in (value.weight, value.bias):
        if isinstance(tensor, Tensor):
            by_head = tensor.double().view(heads.count, heads.size, -1)
            tensor.copy_((basis.mT @ by_head).view_as(tensor))
    by_head = reads.double().view(reads.shape[0], heads.count, -1, heads.size)
    reads.copy_(torch.einsum("ohqi,hij->ohqj", by_head, basis).reshape(reads.shape))


def _rotate_columns(weight: Tensor, basis: Tensor) -> None:
    basis = basis.to(weight.device)
    for rows, block in _blocks(weight):
        weight[rows] = (block @ basis).to(weight.dtype)


def _blocks(weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The rows of a matrix `[out, in]` in blocks of float64: no whole copy of an embedding is made."""
    out, in_features = weight.shape
    for rows in row_blocks(out, in_features, weight.device):
        yield rows, weight[rows].double()


def _untie(model: Any, stream: ResidualStream) -> None:
    """Give heads that share the embedding's matrix one of their own."""
    table = dense_weight(model.get_submodule(stream.embedding), detach=False)
    for name in stream.heads:
        head = model.get_submodule(name)
        if head.weight is table:
            head.weight = nn.Parameter(table.detach().clone(), table.requires_grad)
    for module in model.modules():
        if getattr(module, "_tied_weights_keys", None):
            module._tied_weights_keys = None
    model.all_tied_weights_keys = {}
    model.config.tie_word_embeddings = False
