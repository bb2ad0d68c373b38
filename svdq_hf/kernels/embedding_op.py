"""`svdq::embedding`: rows of a stored matrix, by number: `ids [...] -> [..., in]`.

Each row asked for is taken out of the parts as they are stored, and only those are dequantized. It has no
gradient: what it reads is frozen, and the salient entries train through the product alone.
"""

from typing import Any

import torch
from torch import Tensor

from svdq_hf.format.decode import dense_blocks, take_rows
from svdq_hf.kernels.linear_op import STORED, TAGS, named, together

EMBEDDING = "svdq::embedding"
torch.library.define(
    EMBEDDING, f"(Tensor ids, {STORED}, int in_features, int group, ScalarType dtype) -> Tensor", tags=TAGS
)


@torch.library.impl(EMBEDDING, "CompositeExplicitAutograd")
def _embedding(ids: Tensor, *others: Any) -> Tensor:
    *stored, in_features, group, dtype = others
    found = torch.empty(ids.numel(), in_features, dtype=dtype, device=ids.device)
    for rows, block in dense_blocks(take_rows(named(stored), ids.reshape(-1)), in_features, group):
        found[rows] = block.to(dtype)
    return found.view(*ids.shape, in_features)


def _shape(ids: Tensor, *others: Any) -> Tensor:
    together(ids.device, others[:-3])
    return ids.new_empty(*ids.shape, others[-3], dtype=others[-1])


torch.library.register_fake(EMBEDDING, _shape)
