"""Product inside `torch.func`'s transforms (grad, vmap, jacrev, ...), in operations that they know.

The transforms take functions apart operation by operation and do not know the ops here. So the whole weight
is dequantized and multiplied by torch itself: exact, slower, and for that time a dense weight exists. Only x,
the bias and the salient values may be differentiated or mapped over; packed tensors are frozen. Not here: the
op outside of transforms (`kernels.linear_op`).
"""

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor, peek_interpreter_stack

from svdq_hf.format.decode import dense_blocks
from svdq_hf.format.parts import StoredWeight
from svdq_hf.kernels.contract import check_linear
from svdq_hf.kernels.positions import check_positions


def is_transforming() -> bool:
    """Whether a transform of `torch.func` is running."""
    return not torch.compiler.is_compiling() and peek_interpreter_stack() is not None


def linear(x: Tensor, stored: StoredWeight, bias: Tensor | None, in_features: int, group: int) -> Tensor:
    """`x @ W.T + bias` for x, bias and salient values of a transform.

    Args:
        x: activations `[..., in]`.
        stored: the weight W `[out, in]`.
        bias: `[out]`, or None.
        in_features: columns of the weight.
        group: columns that share a scale.

    Returns:
        `[..., out]`, in the dtype of x.

    Raises:
        ValueError: a packed tensor belongs to a transform, too; or see `check_linear` and `check_positions`.
    """
    check_linear(x, stored, bias, in_features, group)
    _refuse_packed(stored)
    check_positions(stored.salient_rows, stored.salient_columns, stored.out, in_features)
    low_bits = {**stored.as_dict(), **{name: stored.as_dict()[name][:0] for name in _SALIENT}}
    dense = torch.cat([block.clone() for _, block in dense_blocks(low_bits, in_features, group)])
    places = stored.salient_rows.long(), stored.salient_columns.long()
    weight = dense.index_put(places, stored.salient_values.float(), accumulate=True)
    return torch.nn.functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


_SALIENT = ("salient_values", "salient_rows", "salient_columns")


def _refuse_packed(stored: StoredWeight) -> None:
    for name, part in stored.as_dict().items():
        if name != "salient_values" and is_functorch_wrapped_tensor(part):
            raise ValueError(
                f"{name} of a quantized layer is frozen: a transform of torch.func can neither differentiate "
                "it nor map over it. Give it only the parameters that train, "
                "{name: p for name, p in model.named_parameters() if p.requires_grad}"
            )


def refuse(what: str) -> None:
    """Refuse a transform of `torch.func` around something that it cannot take apart.

    Args:
        what: cannot be computed, for the error.

    Raises:
        ValueError: a transform is running.
    """
    if is_transforming():
        raise ValueError(
            f"{what} cannot be computed inside torch.func's transforms (grad, vmap, jacrev, ...): which "
            "expert computes depends on data. Use loss.backward(), one sample at a time, or "
            "svdq_hf.dequantize_model(model) first"
        )
