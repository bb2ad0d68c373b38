"""Bases for a rotated decoder: in which directions its residual stream and its heads' values vary most.

From a few batches, or without data from the weights. The stream is a sum: of an embedding, and of what each
block writes to it. Where a block's last layer is fed with what has the same size in all directions, it writes
with covariance `W W^T`; so, without data, the sum of these and of the embedding's stands for the stream's,
and `W W^T` of the layer that makes the values for theirs. (What the readers amplify, the sum of their
`W^T W`, tells less: docs/resq.md.) Not here: how axes are made of a covariance (`core.subspace`), the
rotation itself (`quantize.rotate`).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from svdq_hf.calibration.inputs import collect_inputs
from svdq_hf.core.subspace import mixed, principal_axes, subspace_columns
from svdq_hf.quantize.residual_stream import Block, Heads, ResidualStream
from svdq_hf.quantize.rotate import Bases
from svdq_hf.quantize.selection import dense_weight

_STREAM = "residual stream"


@dataclass(frozen=True)
class Covariances:
    """How a model's vectors vary, up to a factor each.

    Attributes:
        stream: of what the readers of the residual stream read, `[hidden, hidden]`.
        values: of each head's values, by the name of the layer that makes them: `[heads, size, size]`.
    """

    stream: Tensor
    values: dict[str, Tensor]


def seen_covariances(model: nn.Module, stream: ResidualStream, batches: Iterable[Any]) -> Covariances:
    """The covariances on calibration batches.

    Args:
        model: the dense model, its norms folded.
        stream: what `find_stream` found.
        batches: each what the model takes.

    Raises:
        ValueError: see `collect_inputs`.
    """
    layers: dict[str, nn.Module | list[nn.Module]] = {
        _STREAM: [model.get_submodule(block.readers[0]) for block in stream.blocks]
    }
    layers |= {heads.value: model.get_submodule(block.writer) for block, heads in _attention(stream)}
    seen = collect_inputs(model, layers, batches, gram=True)
    grams = {name: one.gram for name, one in seen.items() if one.gram is not None}
    values = {heads.value: _by_head(grams[heads.value], heads) for _, heads in _attention(stream)}
    return Covariances(grams[_STREAM], values)


def weight_covariances(model: nn.Module, stream: ResidualStream) -> Covariances:
    """Stand-ins for the covariances, from the weights alone: of what is written, each writer by itself.

    Args:
        model: the dense model, its norms folded.
        stream: what `find_stream` found.
    """
    written = _mean_square(dense_weight(model.get_submodule(stream.embedding)))
    for weight in (dense_weight(model.get_submodule(block.writer)).double() for block in stream.blocks):
        written += weight @ weight.T
    values = {}
    for _, heads in _attention(stream):
        rows = dense_weight(model.get_submodule(heads.value)).double().view(heads.count, heads.size, -1)
        values[heads.value] = rows @ rows.mT
    return Covariances(written, values)


def check_subspaces(model: nn.Module, stream: ResidualStream, share: float) -> None:
    """Refuse a model in which a subspace would be all of the stream, or all of a head.

    Args:
        model: the dense model.
        stream: what `find_stream` found.
        share: of the subspace.

    Raises:
        ValueError: it names the embedding, or the layer that makes the values of the head.
    """
    widths = {stream.embedding: dense_weight(model.get_submodule(stream.embedding)).shape[1]}
    widths |= {heads.value: heads.size for _, heads in _attention(stream)}
    for name, width in widths.items():
        try:
            subspace_columns(width, share)
        except ValueError as error:
            raise ValueError(f"{name}: {error}; take subspace=0") from error


def bases_of(
    covariances: Covariances,
    share: float,
    seed: int,
    axes: Callable[[Tensor], Tensor] = principal_axes,
) -> Bases:
    """Bases whose last columns are the subspace of high precision.

    Args:
        covariances: of the model.
        share: of the subspace; 0: a random rotation of everything.
        seed: of the random rotations.
        axes: the axes of a covariance `[..., n, n]`, of the largest variance last.
    """
    generator = torch.Generator().manual_seed(seed)

    def basis(covariance: Tensor) -> Tensor:
        columns = subspace_columns(covariance.shape[-1], share)
        return mixed(axes(covariance.cpu()), columns, generator)

    values = {name: basis(covariance) for name, covariance in covariances.values.items()}
    return Bases(basis(covariances.stream), values)


def _attention(stream: ResidualStream) -> list[tuple[Block, Heads]]:
    return [(block, block.heads) for block in stream.blocks if block.heads is not None]


def _by_head(gram: Tensor, heads: Heads) -> Tensor:
    """The Gram matrix of each head's values: query heads that share them are summed up.

    Args:
        gram: of the inputs of the layer that reads all heads, `[in, in]`.
        heads: what these are.
    """
    size = heads.size
    of_queries = [gram[at : at + size, at : at + size] for at in range(0, gram.shape[0], size)]
    return torch.stack(of_queries).view(heads.count, -1, size, size).sum(1)


def _mean_square(rows: Tensor) -> Tensor:
    """Mean of `r^T r` over rows `[rows, in]`: `[in, in]`, float64; no whole copy of an embedding is made."""
    total = rows.new_zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
    for block in torch.split(rows, 4096):
        total += block.double().T @ block.double()
    return total / rows.shape[0]
