"""The op `svdq::embedding`: rows of a stored matrix by number, `ids [...] -> [..., in]`.

The rows are taken out of the stored parts, and only those are dequantized; or a backend does both at once.
It has no gradient: what it reads is frozen, and the salient entries train through the product alone. Not
here: the module (`nn.embedding`).
"""

from typing import Any

import torch
from torch import Tensor

from svdq_hf.format.decode import dense_blocks, take_rows
from svdq_hf.format.parts import PARTS, StoredWeight
from svdq_hf.kernels.backends import LOOKS_AT_DATA, backend_for
from svdq_hf.kernels.contract import check_embedding
from svdq_hf.kernels.linear_op import STORED, with_float32_values
from svdq_hf.kernels.positions import check_positions

EMBEDDING = "svdq::embedding"
torch.library.define(
    EMBEDDING,
    f"(Tensor ids, {STORED}, int in_features, int group, ScalarType dtype) -> Tensor",
    tags=LOOKS_AT_DATA,
)


def _arguments(others: tuple[Any, ...]) -> tuple[StoredWeight, int, int, torch.dtype]:
    """The op's arguments after the ids: stored parts, in_features, group, dtype."""
    in_features, group, dtype = others[len(PARTS) :]
    return StoredWeight(*others[: len(PARTS)]), in_features, group, dtype


@torch.library.impl(EMBEDDING, "CompositeExplicitAutograd")
def _embedding(ids: Tensor, *others: Any) -> Tensor:
    stored, in_features, group, dtype = _arguments(others)
    check_embedding(ids, stored, in_features, group, dtype)
    read = backend_for(ids.new_empty(0, dtype=dtype), stored, in_features, group).rows
    if read is not None:
        wanted = read(ids.reshape(-1), with_float32_values(stored), in_features, group, dtype)
        return wanted.view(*ids.shape, in_features)
    check_positions(stored.salient_rows, stored.salient_columns, stored.out, in_features)
    found = torch.empty(ids.numel(), in_features, dtype=dtype, device=ids.device)
    for rows, block in dense_blocks(take_rows(stored.as_dict(), ids.reshape(-1)), in_features, group):
        found[rows] = block.to(dtype)
    return found.view(*ids.shape, in_features)


def _shape(ids: Tensor, *others: Any) -> Tensor:
    stored, in_features, group, dtype = _arguments(others)
    check_embedding(ids, stored, in_features, group, dtype)
    return ids.new_empty(*ids.shape, in_features, dtype=dtype)


torch.library.register_fake(EMBEDDING, _shape)
