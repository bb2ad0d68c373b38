"""Contract of the ops: what their arguments must be (devices, dtypes, sizes), checked here and nowhere else.

Each op checks before it computes, and before it answers with a shape alone (on the meta device, in a trace).
So a backend may rely on its arguments: no tensor is on another device, none is read beyond its end. The C
library's direct call from Python (`kernels.cpu_direct`) checks the same itself and leaves everything else to
the op. Only sizes are checked, never data, so nothing waits for a device. Not here: salient positions
(`kernels.positions`), which are data.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from svdq_hf.core.packing import bits_of, packed_shape
from svdq_hf.format.parts import OPTIONAL, PARTS, StoredWeight

_PARTS_AND_BIAS = (*PARTS, "bias")
_MAY_BE_ABSENT = (*OPTIONAL, "bias")
_CODES = (torch.int8,)
_SCALES = (torch.float32, torch.bfloat16)
_SCALES_OF_8_BITS = (torch.int8,)  # those beside a row_scale; kernels multiply no other by it
_FINE_SCALES = (torch.bfloat16,)
_VALUES = (torch.float32, torch.bfloat16, torch.float16)  # FSDP's mixed precision casts them
_POSITIONS = (torch.int32,)
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_INTEGERS = (torch.int64, torch.int32)


def check_linear(x: Tensor, stored: StoredWeight, bias: Tensor | None, in_features: int, group: int) -> None:
    """Refuse arguments that `svdq::linear` cannot compute with.

    Args:
        x: activations `[..., in]`.
        stored: the weight `[out, in]`.
        bias: `[out]`, or None.
        in_features: columns of the weight.
        group: columns that share a scale.

    Raises:
        ValueError: it names x or the part that is wrong, and its size, dtype or device.
        TypeError: x or a part that every weight has is None; it is named.
    """
    _check_devices("input", x, _PARTS_AND_BIAS, (*stored, bias))
    _check_tokens("input", x, in_features)
    _check_stored(stored, in_features, group)
    if bias is not None:
        _check_part("bias", bias, (stored.out,), _FLOATS)


def check_input_gradient(gradient: Tensor, stored: StoredWeight, in_features: int, group: int) -> None:
    """Refuse arguments that `svdq::input_gradient` cannot compute with.

    Args:
        gradient: `[..., out]`.
        stored: the weight `[out, in]`.
        in_features: columns of the weight.
        group: columns that share a scale.

    Raises:
        ValueError: see `check_linear`.
    """
    _check_devices("gradient", gradient, PARTS, stored)
    _check_stored(stored, in_features, group)
    _check_tokens("gradient", gradient, stored.out)


def check_embedding(
    ids: Tensor, stored: StoredWeight, in_features: int, group: int, dtype: torch.dtype
) -> None:
    """Refuse arguments that `svdq::embedding` cannot compute with.

    Args:
        ids: `[...]`, int64 or int32.
        stored: the weight `[rows, in]`.
        in_features: columns of the weight.
        group: columns that share a scale.
        dtype: of the result.

    Raises:
        ValueError: see `check_linear`.
    """
    _check_devices("ids", ids, PARTS, stored)
    if ids.dtype not in _INTEGERS or dtype not in _FLOATS:
        raise ValueError(f"ids are {ids.dtype} and rows {dtype}; ids are int64 or int32, rows floating point")
    _check_stored(stored, in_features, group)


def check_experts(x: Tensor, stored: StoredWeight, ends: Tensor, in_features: int, group: int) -> None:
    """Refuse arguments that `svdq::expert_linear` cannot compute with.

    Args:
        x: tokens sorted by expert, `[n, in]`.
        stored: the stacked weights `[experts, out, in]`.
        ends: where each expert's tokens end, `[experts]`.
        in_features: columns of each weight.
        group: columns that share a scale.

    Raises:
        ValueError: see `check_linear`.
    """
    _check_stack("input", x, stored, ends)
    _check_stored(stored, in_features, group, stacked=True)
    _check_matrix("input", x, in_features)


def check_experts_gradient(
    gradient: Tensor, stored: StoredWeight, ends: Tensor, in_features: int, group: int
) -> None:
    """Refuse arguments that `svdq::expert_input_gradient` cannot compute with.

    Args:
        gradient: `[n, out]`, sorted by expert.
        stored: the stacked weights `[experts, out, in]`.
        ends: where each expert's tokens end, `[experts]`.
        in_features: columns of each weight.
        group: columns that share a scale.

    Raises:
        ValueError: see `check_linear`.
    """
    _check_stack("gradient", gradient, stored, ends)
    _check_stored(stored, in_features, group, stacked=True)
    _check_matrix("gradient", gradient, stored.weight.shape[1])


def check_values_gradient(x: Tensor, gradient: Tensor, rows: Tensor, columns: Tensor, ends: Tensor) -> None:
    """Refuse arguments that `svdq::expert_values_gradient` cannot compute with.

    Args:
        x: tokens sorted by expert, `[n, in]`.
        gradient: `[n, out]`.
        rows: rows of the salient entries, `[experts, k]`.
        columns: columns of the salient entries, `[experts, k]`.
        ends: where each expert's tokens end, `[experts]`.

    Raises:
        ValueError: see `check_linear`.
    """
    names = ("gradient", "salient_rows", "salient_columns", "ends")
    _check_devices("input", x, names, (gradient, rows, columns, ends))
    for name, tokens in (("input", x), ("gradient", gradient)):
        _check_matrix(name, tokens, tokens.shape[-1] if tokens.ndim else 0)
    if gradient.shape[0] != x.shape[0]:
        raise ValueError(f"gradient has {gradient.shape[0]} tokens and the input {x.shape[0]}")
    experts, k = ends.shape[0] if ends.ndim else 0, rows.shape[-1] if rows.ndim else 0
    _check_part("ends", ends, (experts,), _INTEGERS)
    _check_part("salient_rows", rows, (experts, k), _POSITIONS)
    _check_part("salient_columns", columns, (experts, k), _POSITIONS)


def check_ends(ends: Sequence[int], tokens: int) -> None:
    """Refuse ends of experts' tokens that decrease, or exceed the number of tokens.

    Args:
        ends: where each expert's tokens end.
        tokens: how many there are.

    Raises:
        ValueError: an end is before the previous one, or beyond the tokens.

    >>> check_ends([0, 2, 2, 5], 5)
    """
    for before, end in pairwise([0, *ends]):
        if not before <= end <= tokens:
            raise ValueError(f"ends has {end} after {before}, of {tokens} tokens: ends must not fall")


def _check_tokens(what: str, x: Tensor, width: int) -> None:
    if x.ndim == 0 or x.shape[-1] != width:
        raise ValueError(f"{what} {list(x.shape)} does not end in the layer's {width} features")
    if x.dtype not in _FLOATS:
        raise ValueError(
            f"{what} is {x.dtype}; the layer computes in floating point. If the model itself cast it to "
            "the dtype of this layer's weight, keep the layer dense: modules_to_not_convert"
        )


def _check_matrix(what: str, x: Tensor, width: int) -> None:
    _check_tokens(what, x, width)
    if x.ndim != 2:
        raise ValueError(f"{what} {list(x.shape)} is not a list of tokens [n, {width}]")


def _check_devices(what: str, x: Tensor, names: Sequence[str], tensors: Sequence[Tensor | None]) -> None:
    """Refuse a tensor on another device (offloaded, say): torch would read whatever is in memory."""
    for name, tensor in ((what, x), *zip(names, tensors, strict=True)):
        if tensor is None and name not in _MAY_BE_ABSENT:  # torch hands None on where its schema says Tensor
            raise TypeError(f"{name} is None: it must be a tensor")
    device = x.device
    for name, tensor in zip(names, tensors, strict=True):
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{what} is on {device} and the {name} on {tensor.device}; move one of them")


def _check_stack(what: str, x: Tensor, stored: StoredWeight, ends: Tensor) -> None:
    _check_devices(what, x, (*PARTS, "ends"), (*stored, ends))
    if stored.weight.ndim < 3:
        raise ValueError(f"weight is {list(stored.weight.shape)}: not the codes of a stack of experts")
    _check_part("ends", ends, (stored.weight.shape[0],), _INTEGERS)


def _check_stored(stored: StoredWeight, in_features: int, group: int, *, stacked: bool = False) -> None:
    """Refuse parts of another size or dtype than a layer's; stacked: those of all experts."""
    weight, scale, values, rows, columns, row_scale, column_scale, levels = stored
    if in_features < 1 or group < 1:
        raise ValueError(f"in_features={in_features}, group={group}: must be 1 or more")
    least = 3 if stacked else 2
    if weight.ndim not in (least, least + 1):
        raise ValueError(f"weight is {list(weight.shape)}, which is not what the format stores as codes")
    stack = tuple(weight.shape[:1]) if stacked else ()
    out, bits = weight.shape[len(stack)], bits_of(weight[0] if stacked else weight)
    if bits not in (3, 4, 8):
        raise ValueError(f"weight is {list(weight.shape)}, which is not what the format stores as codes")
    _check_part("weight", weight, (*stack, out, *packed_shape(in_features, bits)), _CODES)
    scales = scale.shape[-2] if scale.ndim > 1 else 0
    rows_of_scale = 1 if scales == 1 else out
    kinds = _SCALES if row_scale is None else _SCALES_OF_8_BITS
    _check_part("weight_scale", scale, (*stack, rows_of_scale, -(-in_features // group)), kinds)
    entries = (*stack, values.shape[-1] if values.ndim else 0)
    _check_part("salient_values", values, entries, _VALUES)
    _check_part("salient_rows", rows, entries, _POSITIONS)
    _check_part("salient_columns", columns, entries, _POSITIONS)
    if row_scale is not None:
        _check_part("row_scale", row_scale, (*stack, out), _FINE_SCALES)
    if column_scale is not None:
        _check_part("column_scale", column_scale, (*stack, in_features), _FINE_SCALES)
    if levels is not None:
        _check_part("levels", levels, (*stack, 1 << bits), _CODES)


def _check_part(name: str, part: Tensor, shape: Sequence[int], dtypes: Sequence[torch.dtype]) -> None:
    if part.shape == shape and part.dtype in dtypes:
        return
    kinds = " or ".join(str(dtype) for dtype in dtypes)
    raise ValueError(
        f"{name} is {list(part.shape)} {part.dtype}, which is not what the format stores for such a layer: "
        f"{list(shape)} {kinds}"
    )
