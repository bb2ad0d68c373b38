"""Packed embeddings: SVDQEmbedding, with its own parts, and TiedEmbedding, which reads another module's rows.

Not here: the lookup itself (`kernels.embedding_op`).
"""

from collections.abc import Callable
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from svdq_hf.format.parts import PARTS, Scheme
from svdq_hf.kernels import embedding_op as _embedding_op  # noqa: F401  # defines torch.ops.svdq.embedding
from svdq_hf.nn.linear import SVDQLinear, leaf_of_a_trace


class TiedEmbedding(nn.Module):
    """Embedding that reads the rows of a packed matrix elsewhere: ids `[...]` -> `[..., in]`.

    The matrix is a quantized output head's, or an SVDQEmbedding's. This module stores nothing: one matrix has
    one place in a file, under the other module's name.

    Args:
        head: the module whose rows are the embeddings.
        dense: the embedding that this one replaces; its weight is freed.
    """

    def __init__(self, head: SVDQLinear, dense: nn.Embedding) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = head.out_features, head.in_features
        self.dtype = dense.weight.dtype
        self.scale, self.rounded = embedding_factor(dense)
        dense.weight = nn.Parameter(dense.weight.detach().to("meta"), requires_grad=False)
        self._others = (head, dense)  # in a tuple: no submodules, whose parts would be stored twice

    @property
    def head(self) -> SVDQLinear:
        """The module whose rows are the embeddings."""
        return self._others[0]

    @property
    def weight(self) -> Tensor:
        """A meta tensor `[rows, in]` with the shape and dtype of the dense weight."""
        weight = torch.empty(self.num_embeddings, self.embedding_dim, dtype=self.dtype, device="meta")
        weight._is_hf_initialized = True  # type: ignore[attr-defined]  # some families reach for it
        return weight

    def forward(self, ids: Tensor) -> Tensor:
        """Look up ids `[...]`: rows `[..., in]`."""
        return self.read(self.head, ids)

    def read(self, head: SVDQLinear, ids: Tensor) -> Tensor:
        """The embeddings of some ids.

        Args:
            head: the module whose rows are the embeddings.
            ids: `[...]`, int64 or int32.

        Returns:
            `[..., in]`, of the dense embedding's dtype.

        Raises:
            ValueError: the packed matrix is sharded by itself, or on another device than the ids.
        """
        if isinstance(ids, Proxy):
            return leaf_of_a_trace(head if isinstance(head, SVDQEmbedding) else self, ids)
        if hasattr(head.weight, "full_tensor"):  # a DTensor, in an FSDP group of its own
            raise ValueError(
                "the packed matrix, whose rows are the embeddings, is sharded by itself: leave it to the "
                "group of the module that holds it and the embedding, fully_shard(model)"
            )
        if head.weight.device != ids.device:  # offloaded: only the head's own hook brings it back
            raise ValueError(
                f"ids are on {ids.device} and the packed matrix, whose rows are the embeddings, on "
                f"{head.weight.device}: keep the two on one device (of several GPUs DistributedDataParallel "
                "does, DataParallel does not)"
            )
        stored = [None if (part := getattr(head, name)) is None else part.detach() for name in PARTS]
        rows: Tensor = torch.ops.svdq.embedding(ids, *stored, head.in_features, head.group, self.dtype)
        if self.rounded:  # as in the dense embedding, of which it is a buffer
            return rows * torch.tensor(self.scale, dtype=self.dtype)
        return rows if self.scale == 1 else rows * self.scale

    def restored(self, weight: nn.Parameter) -> nn.Embedding:
        """The dense embedding.

        Args:
            weight: of the dense head, `[rows, in]`.
        """
        dense = self._others[1]
        dense.weight = weight
        if self.rounded:  # it may be on meta
            dense.register_buffer("embed_scale", torch.tensor(self.scale), persistent=False)
        return dense

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "TiedEmbedding":
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype  # a model cast to another dtype
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, rows of another module"


class SVDQEmbedding(SVDQLinear):
    """Embedding in its own packed parts: ids `[...]` -> `[..., in]`.

    Its matrix `[rows, in]` is stored like that of a linear layer; nothing of it trains.

    Args:
        dense: the embedding that this one replaces; its weight is freed.
        scheme: how the matrix is stored.
        device: of the empty parts.
    """

    def __init__(self, dense: nn.Embedding, scheme: Scheme, device: torch.device | str | None = None) -> None:
        super().__init__(dense.embedding_dim, dense.num_embeddings, scheme, bias=False, device=device)
        values = self.salient_values.detach()
        del self.salient_values
        self.register_buffer("salient_values", values)  # a lookup has no gradient
        self._own = (TiedEmbedding(self, dense),)  # in a tuple: no submodule

    @property
    def reader(self) -> TiedEmbedding:
        """The TiedEmbedding that looks the rows up."""
        return self._own[0]

    def forward(self, ids: Tensor) -> Tensor:
        """Look up ids `[...]`: rows `[..., in]`."""
        return self.reader.read(self, ids)  # of this module: DataParallel makes replicas of it

    def restored(self, weight: nn.Parameter) -> nn.Embedding:
        """The dense embedding.

        Args:
            weight: of the embedding, `[rows, in]`.
        """
        return self.reader.restored(weight).train(self.training)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SVDQEmbedding":
        self.reader._apply(fn, recurse)
        super()._apply(fn, recurse)
        return self

    def extra_repr(self) -> str:
        k, group = self.salient_values.numel(), self.scheme.grid.group_size
        return f"{self.out_features}, {self.in_features}, k={k}, group_size={group}"


def can_be_read(module: nn.Module) -> TypeGuard[nn.Embedding]:
    """Whether a module only looks rows up, and at most multiplies them by a number (as Gemma's does)."""
    named = type(module) is nn.Embedding or type(module).__name__.endswith("ScaledWordEmbedding")
    return named and isinstance(module, nn.Embedding)


def embedding_factor(embedding: nn.Embedding) -> tuple[float, bool]:
    """The number that an embedding's rows are multiplied by, and whether the number is a tensor.

    A tensor is rounded to the dtype of the rows first, a Python number is not. 1 where there is none.
    """
    scale = getattr(embedding, "embed_scale", 1.0)
    return float(getattr(embedding, "scalar_embed_scale", scale)), isinstance(scale, Tensor)
