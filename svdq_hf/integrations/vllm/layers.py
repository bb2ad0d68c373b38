"""Fused layers of vLLM (q, k and v; gate and up) as lists of quantized linear layers.

Not here: vLLM's own classes (`integrations.vllm.plugin`), and cutting matrices (`format.slices`).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from svdq_hf.format.slices import StoredMatrix
from svdq_hf.nn.linear import SVDQLinear


def layers_of(pieces: Sequence[StoredMatrix]) -> nn.ModuleList:
    """A layer without bias for each stored matrix.

    Args:
        pieces: stored matrices `[out_i, in]`.
    """
    layers = nn.ModuleList()
    for piece in pieces:
        layer = SVDQLinear(piece.in_features, piece.out_features, piece.scheme, bias=False, device="meta")
        layer.load_parts(piece.parts)
        layers.append(layer.requires_grad_(False).eval())
    return layers


def linear_of(layers: nn.ModuleList, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """The product with all layers' weights, one below the other.

    Args:
        layers: of weights `[out_i, in]`.
        x: `[..., in]`.
        bias: `[sum of out_i]`, or None.

    Returns:
        `[..., out]`, of the dtype of `x`.
    """
    outputs = [layer(x) for layer in layers]
    y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
    return y if bias is None else y + bias.to(y.dtype)
