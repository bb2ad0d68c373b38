"""SVDQEmbedding: the embedding of a model whose output head is quantized and shares its matrix."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from svdq_hf.decompose import PARTS
from svdq_hf.kernels import lookup as _lookup  # noqa: F401  # defines torch.ops.svdq.embedding
from svdq_hf.linear import SVDQLinear


class SVDQEmbedding(nn.Module):
    """Looks rows up in a quantized output head: ids `[...]` -> `[..., in]`.

    It stores nothing: one matrix, one place in a file, under the head's name.

    head: whose rows are the embeddings. dense: the embedding that this one stands for; its weight is let go.
    """

    def __init__(self, head: SVDQLinear, dense: nn.Embedding) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = head.out_features, head.in_features
        self.dtype = dense.weight.dtype
        self.scale = scale_of(dense)
        dense.weight = nn.Parameter(dense.weight.detach().to("meta"), requires_grad=False)
        dense.weight._is_hf_initialized = True  # type: ignore[attr-defined]  # some families reach for it
        self._others = (head, dense)  # in a tuple: no submodules, whose parts would be stored twice

    @property
    def head(self) -> SVDQLinear:
        """The output head."""
        return self._others[0]

    @property
    def weight(self) -> Tensor:
        """A tensor without data, of the shape and dtype that the dense weight would have."""
        return self._others[1].weight

    def forward(self, ids: Tensor) -> Tensor:
        head = self.head
        stored = [None if (part := getattr(head, name)) is None else part.detach() for name in PARTS]
        rows: Tensor = torch.ops.svdq.embedding(ids, *stored, head.in_features, head.group, self.dtype)
        return rows if self.scale == 1 else rows * torch.tensor(self.scale, dtype=self.dtype)

    def restored(self, weight: nn.Parameter) -> nn.Embedding:
        """The dense embedding again, with the weight `[out, in]` of a dense head."""
        dense = self._others[1]
        dense.weight = weight
        if isinstance(getattr(dense, "embed_scale", None), Tensor):  # a buffer, which may be on meta
            dense.register_buffer("embed_scale", torch.tensor(self.scale), persistent=False)
        return dense

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SVDQEmbedding":
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype  # a model cast to another dtype
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, rows of the output head"


def can_be_read(module: nn.Module) -> bool:
    """Whether a module only looks rows up, and maybe multiplies them by a number (as Gemma's does)."""
    named = type(module) is nn.Embedding or type(module).__name__.endswith("ScaledWordEmbedding")
    return named and isinstance(module, nn.Embedding)


def scale_of(embedding: nn.Embedding) -> float:
    """The number that an embedding's rows are multiplied by; 1 where there is none."""
    scale = getattr(embedding, "scalar_embed_scale", getattr(embedding, "embed_scale", 1.0))
    return float(scale)
