"""Reference backend in plain torch: the oracle that every faster kernel is tested against, and the fallback.

A block of rows at a time is dequantized into one buffer, the salient weights are added, and torch's
own product does the rest; a dense weight never exists. The block is rounded to the dtype of the
activations, as the weight of a dense layer in that dtype is. Not here: the choice (`kernels.backends`).
"""

import torch
from torch import Tensor

from svdq_hf.format.decode import dense_blocks
from svdq_hf.format.parts import StoredWeight
from svdq_hf.kernels.positions import check_positions


def supports(x: Tensor, stored: StoredWeight, in_features: int, group: int) -> None:
    """None: it computes everything that the format can store, on every device and in every dtype.

    Args:
        x: activations `[..., in]`.
        stored: the weight `[out, in]`.
        in_features: its columns.
        group: columns that share a scale.
    """


def linear(
    x: Tensor, stored: StoredWeight, bias: Tensor | None, in_features: int, group: int, fast: bool = False
) -> Tensor:
    """`x @ W.T + bias`.

    Args:
        x: activations `[..., in]`.
        stored: the weight W `[out, in]`.
        bias: `[out]`, or None.
        in_features: columns of the weight.
        group: columns that share a scale.
        fast: no effect here.

    Returns:
        `[..., out]`, in the dtype of x.

    Raises:
        ValueError: a salient position is out of range or out of order.
    """
    check_positions(stored.salient_rows, stored.salient_columns, stored.out, in_features)
    tokens = x.reshape(-1, in_features)
    y = x.new_empty(*x.shape[:-1], stored.out)  # not a view of anything: callers change it in place
    flat = y.view(-1, stored.out)
    for rows, block in dense_blocks(stored.as_dict(), in_features, group):
        torch.mm(tokens, block.to(x.dtype).T, out=flat[:, rows])
    if bias is not None:
        y += bias.to(x.dtype)
    return y


def input_gradient(gradient: Tensor, stored: StoredWeight, in_features: int, group: int) -> Tensor:
    """`gradient @ W`.

    Args:
        gradient: `[..., out]`.
        stored: the weight W `[out, in]`.
        in_features: its columns.
        group: columns that share a scale.

    Returns:
        `[..., in]`, in the dtype of gradient.

    Raises:
        ValueError: see `linear`.
    """
    check_positions(stored.salient_rows, stored.salient_columns, stored.out, in_features)
    tokens = gradient.reshape(-1, gradient.shape[-1])
    total = gradient.new_zeros(*gradient.shape[:-1], in_features)
    for rows, block in dense_blocks(stored.as_dict(), in_features, group):
        total.view(-1, in_features).addmm_(tokens[:, rows], block.to(gradient.dtype))
    return total
