"""The op in plain torch: the oracle that every faster kernel is tested against, and the fallback.

A block of rows at a time is dequantized into one buffer, the salient weights are added, and torch's
own product does the rest; a dense weight never exists. The block is rounded to the dtype of the
activations, as the weight of a dense layer in that dtype is.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from svdq_hf.format.decode import dense_blocks


def linear(
    x: Tensor, parts: Mapping[str, Tensor], bias: Tensor | None, in_features: int, group: int
) -> Tensor:
    """`x @ W.T + bias`: x `[..., in]` -> `[..., out]`, W in the parts of `part_specs`."""
    out = parts["weight"].shape[0]
    tokens = x.reshape(-1, in_features)
    y = x.new_empty(*x.shape[:-1], out)  # not a view of anything: callers change it in place
    flat = y.view(-1, out)
    for rows, block in dense_blocks(parts, in_features, group):
        torch.mm(tokens, block.to(x.dtype).T, out=flat[:, rows])
    if bias is not None:
        y += bias.to(x.dtype)
    return y


def input_gradient(gradient: Tensor, parts: Mapping[str, Tensor], in_features: int, group: int) -> Tensor:
    """`gradient @ W`: gradient `[..., out]` -> `[..., in]`, dequantizing again."""
    tokens = gradient.reshape(-1, gradient.shape[-1])
    total = gradient.new_zeros(*gradient.shape[:-1], in_features)
    for rows, block in dense_blocks(parts, in_features, group):
        total.view(-1, in_features).addmm_(tokens[:, rows], block.to(gradient.dtype))
    return total
