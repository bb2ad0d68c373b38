"""Streams of expert matrices, one at a time, so that no tensor ever holds all dense experts of a layer.

Not here: what is done with each matrix (`quantize.weight`).
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


class Pieces:
    """A stream of expert matrices `[out, in]`, each joined from pieces that are freed once they were read.

    Can be iterated over once.

    Args:
        sources: for each kind of piece (the gate, the up projection) those of all experts, `[rows, in]`.

    >>> pieces = Pieces([[torch.zeros(2, 3)] * 4, [torch.ones(2, 3)] * 4])
    >>> pieces.shape, next(iter(pieces)).sum(1).tolist()
    ((4, 4, 3), [0.0, 0.0, 3.0, 3.0])
    """

    def __init__(self, sources: Sequence[Sequence[Tensor]]) -> None:
        self._sources: list[list[Tensor | None]] = [list(source) for source in sources]
        first = [source[0] for source in sources]
        self.shape = (len(sources[0]), sum(piece.shape[0] for piece in first), *first[0].shape[1:])
        self.device = first[0].device
        self.nbytes = sum(piece.nbytes for source in sources for piece in source)

    def __iter__(self) -> Iterator[Tensor]:
        for expert in range(self.shape[0]):
            pieces = [piece for source in self._sources if (piece := source[expert]) is not None]
            for source in self._sources:
                source[expert] = None
            yield joined(pieces)


def joined(pieces: Sequence[Tensor]) -> Tensor:
    """Pieces `[rows, in]` one below the other, `[sum of rows, in]`; a single piece is returned as it is."""
    return torch.cat(list(pieces)) if len(pieces) > 1 else pieces[0]


@dataclass(frozen=True)
class LazyStack:
    """A stream of expert matrices that are read when their turn comes.

    Can be iterated over once.

    Attributes:
        shape: of all matrices as one tensor, `[experts, out, in]` or transposed.
        weights: the matrices, in the order of the experts.
        device: where they are: the CPU.
    """

    shape: tuple[int, ...]
    weights: Iterable[Tensor]
    device: ClassVar[torch.device] = torch.device("cpu")

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.weights)


def fit_together(sources: Sequence[Sequence[Tensor]]) -> bool:
    """Whether pieces can be joined: every kind has as many, and all of one kind have one shape and dtype.

    Args:
        sources: as for `Pieces`: for each kind those of all experts, `[rows, in]`.
    """
    counts = {len(source) for source in sources}
    kinds = [{(tuple(piece.shape), piece.dtype, piece.device) for piece in source} for source in sources]
    widths = {shape[1:] for kind in kinds for shape, _, _ in kind}
    return len(counts) == 1 and all(len(kind) == 1 for kind in kinds) and len(widths) == 1 and counts != {0}
