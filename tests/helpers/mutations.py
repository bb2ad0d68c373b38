"""Damage to files and tensors, drawn by hypothesis: JSON, bytes, and the arguments of an op.

Each returns what it has made and changes nothing. Not here: what must come of it.
"""

import json
from collections.abc import Callable, Iterator
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

Draw = Callable[[st.SearchStrategy[Any]], Any]

NESTED = "[" * 2000 + "]" * 2000
"""Deeper than a parser that calls itself may go."""

SCALARS = st.sampled_from(
    [None, True, False, 0, 1, -1, 2, 63, 64, 10**30, -(2**63), 2**63, 0.5, 1e308, float("nan"), float("inf")]
) | st.sampled_from(["", "a", "svdq", "normal", "F32", "I8", "BF16", "\x00", "ü" * 40, "../x", "x" * 5000])
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)
SMALL = st.sampled_from([None, True, 0, 1, -1, 3, 64, 0.5, "", "a", "svdq", [], [None], {}, {"a": 1}])
"""Values of a model's own config: a large number there is a large model, which transformers builds."""


def json_text(draw: Draw, parsed: Any, values: st.SearchStrategy[Any] = VALUES) -> str:
    """A JSON text with one value of `parsed` replaced, removed, renamed, given twice, or nested deeply."""
    document = json.loads(json.dumps(parsed))
    places = list(_places(document))
    holder, key = places[draw(st.integers(0, len(places) - 1))]
    way = draw(st.sampled_from(["replace", "replace", "replace", "remove", "rename", "twice", "nest", "cut"]))
    if way == "replace":
        holder[key] = draw(values)
    elif way == "remove":
        del holder[key]
    elif way == "rename" and isinstance(holder, dict):
        holder[draw(st.text(max_size=8))] = holder.pop(key)
    elif way in ("twice", "nest"):
        holder[key] = "MARK"
    text = json.dumps(document)
    if way == "twice" and isinstance(holder, dict):
        first, second = (json.dumps(draw(values)) for _ in range(2))
        return text.replace('"MARK"', f"{first}, {json.dumps(key)}: {second}")
    if way == "cut":
        return text[: draw(st.integers(0, len(text)))]
    return text.replace('"MARK"', NESTED)


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in lists and mappings: its holder, and its key there."""
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])


def data(draw: Draw, before: bytes) -> bytes:
    """A safetensors file with its header, its length or its bytes damaged."""
    length = int.from_bytes(before[:8], "little")
    header, tensors = before[8 : 8 + length], before[8 + length :]
    way = draw(st.sampled_from(["header", "header", "flip", "flip", "cut", "swap", "length", "longer"]))
    if way == "header":
        text = json_text(draw, json.loads(header)).encode("utf-8", "surrogatepass")
        return len(text).to_bytes(8, "little") + text + tensors
    at = st.integers(0, len(before) - 1)
    if way == "flip":
        bytes_ = bytearray(before)
        for place in draw(st.lists(at, min_size=1, max_size=8)):
            bytes_[place] ^= 1 << draw(st.integers(0, 7))
        return bytes(bytes_)
    if way == "cut":
        return before[: draw(at)]
    if way == "swap":
        one, other = sorted((draw(at), draw(at)))
        return before[other:] + before[one:other] + before[:one]
    if way == "length":
        return (
            draw(st.sampled_from([0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1])).to_bytes(
                8, "little"
            )
            + before[8:]
        )
    return before + b"\0" * draw(st.integers(1, 100))


def argument(draw: Draw, value: Any) -> Any:
    """Another value for an argument of an op: a tensor of another kind, or another number."""
    if not isinstance(value, Tensor):
        numbers = [0, 1, -1, 7, 31, 32, 33, 64, 128, 2**31, 2**62, -(2**63)]
        if isinstance(value, torch.dtype):
            return draw(st.sampled_from([torch.bfloat16, torch.int8, torch.complex64, torch.float64]))
        return draw(st.sampled_from([value, *numbers]))
    ways: list[Callable[[Tensor], Any]] = [
        lambda one: None,
        lambda one: one.to("meta"),
        lambda one: one[..., :-1],
        lambda one: one[:0],
        lambda one: one.unsqueeze(0),
        lambda one: one.reshape(-1),
        lambda one: one.flip(0),
        lambda one: torch.cat([one, one]),
        lambda one: one.repeat_interleave(2, -1)[..., ::2],
        lambda one: one.mT.contiguous().mT if one.ndim > 1 else one[::1],
        lambda one: one[..., :1].expand(one.shape),
        lambda one: one[:1],
        lambda one: torch.tensor(3).to(one.dtype),
        lambda one: _one_byte_off(one),
    ]
    ways += [
        lambda one, dtype=dtype: one.to(dtype)
        for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.int64, torch.complex64)
    ]
    if not value.is_floating_point():
        numbers = (-1, 4, 5, 69, 70, 127, 2**31 - 1)
        ways += [lambda one, number=number: _with(one, number) for number in numbers]
    return draw(st.sampled_from(ways))(value)


def _with(tensor: Tensor, number: int) -> Tensor:
    """The same with another last number, as far as its dtype holds that."""
    changed = tensor.clone()
    if changed.numel():
        changed.view(-1)[-1] = min(number, torch.iinfo(tensor.dtype).max)
    return changed


def _one_byte_off(tensor: Tensor) -> Tensor:
    """The same numbers at an address that is no multiple of their size, as in a mapped file."""
    raw = torch.empty(tensor.numel() * tensor.element_size() + 1, dtype=torch.uint8)
    if not tensor.numel() or tensor.dtype == torch.bfloat16:
        return tensor
    numbers = raw[1:].numpy().view(tensor.numpy().dtype).reshape(tensor.shape)
    numbers[...] = tensor.numpy()
    return torch.from_numpy(numbers)
