"""Packed states: the keys or values of a KV cache, token by token, to bytes and back.

A state `[head_dim]` is rounded in four steps, without data but its own:

1. An eighth of the head's channels, the `outlier channels`, is rounded coarsely, to 15 levels, and what they
   lose joins the rest. So they have 8 bits in the end where the others have 4: "4.5 bits" a value.
2. The rest is turned, 64 values at a time, by a Walsh-Hadamard matrix, which evens sizes out.
3. Each group of 64 gets a step (a power of 2 to the eighth, one byte) and a lowest code (one byte).
4. Codes are packed in planes: byte i of 4-bit codes holds code i and code i + 32, as `core.packing` does.

A row depends on no other: tokens are appended, dropped and selected as rows of bytes, and never rounded
again. A code is turned back in integers, so plain torch and the native kernel give the same bits.

Not here: which tokens are packed (`nn.packed_states`), the same decoding in C (`kernels.native.states`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from operator import or_

import torch
from torch import Tensor

from svdq_hf.core.rotation import hadamard

GROUP = 64
"""Values that share a step and are turned together; heads of other sizes are one group."""

EIGHTH = 8
"""One channel in so many is an outlier channel."""

COARSE_TOP = 7
"""The largest coarse code, of -7 to 7: with a zero, so that what is small beside another is left alone."""

FIELDS: dict[int, tuple[int, ...]] = {2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}
"""The bits of each field of a code, from the lowest on; a field of f bits is `group * f / 8` bytes."""

STEPS = torch.exp2((torch.arange(256, dtype=torch.float64) - 136) / 8).float()
"""The step that a byte stands for: 2^-17 to 2^14.9, eight to an octave."""


@dataclass(frozen=True)
class StateFormat:
    """How the states of a head are packed.

    Attributes:
        bits: of a code: 2, 3, 4 or 8.
        outliers: whether an eighth of the channels has a coarse part of 4 bits more.
    """

    bits: int
    outliers: bool = False

    def group_bytes(self, group: int) -> int:
        """Bytes of a group of so many values: codes, coarse codes, step, lowest code, coarse step.

        >>> StateFormat(4).group_bytes(64), StateFormat(4, outliers=True).group_bytes(64)
        (34, 39)
        """
        return group * self.bits // 8 + 2 + (group // (2 * EIGHTH) + 1 if self.outliers else 0)

    def row_bytes(self, head_dim: int) -> int:
        """Bytes of a token's state of one head."""
        group = group_of(head_dim)
        return head_dim // group * self.group_bytes(group)

    def bits_per_value(self, head_dim: int) -> float:
        """Bits that a value takes, with everything.

        >>> StateFormat(4, outliers=True).bits_per_value(64)
        4.875
        """
        return 8 * self.row_bytes(head_dim) / head_dim


def group_of(head_dim: int) -> int:
    """Values of a state that share a step: 64, or all where the head is no multiple of it.

    >>> group_of(256), group_of(80)
    (64, 80)
    """
    return head_dim if head_dim % GROUP else GROUP


def outlier_channels(states: Tensor) -> Tensor:
    """The eighth of a head's channels with the largest mean square: those that get a coarse part.

    Args:
        states: `[batch, heads, tokens, head_dim]`; those of the first tokens do.

    Returns:
        `[heads, head_dim / 8]`, int64, the largest first.

    >>> outlier_channels(torch.arange(16.0).view(1, 1, 1, 16))
    tensor([[15, 14]])
    """
    energy = states.float().square().mean((0, 2))
    return energy.topk(states.shape[-1] // EIGHTH, -1).indices


def encode(states: Tensor, form: StateFormat, channels: Tensor | None) -> Tensor:
    """Pack states.

    Args:
        states: `[..., heads, tokens, head_dim]`, finite.
        form: how.
        channels: the outlier channels `[heads, head_dim / 8]` of a form that has them, else None.

    Returns:
        `[..., heads, tokens, row_bytes]`, uint8.

    Raises:
        OverflowError: a state is NaN or infinite, or needs a larger step than the largest of `STEPS`.
    """
    dense = states.float()
    group = group_of(dense.shape[-1])
    coarse: Sequence[Tensor] = ()
    if channels is not None:
        index = channels.unsqueeze(-2).expand(*dense.shape[:-1], channels.shape[-1])
        coarse_codes, coarse_step = _coarse_codes(_grouped(dense.gather(-1, index), group // EIGHTH))
        dense = dense.scatter_add(-1, index, -_coarse_values(coarse_codes, coarse_step))
        coarse = (_packed(coarse_codes, 4), coarse_step)
    groups = _turned(_grouped(dense, group)) * turned_together(group) ** -0.5
    codes, step, lowest = _codes(groups, form.bits)
    parts = (_packed(codes, form.bits), *coarse[:1], step, lowest.view(torch.uint8), *coarse[1:])
    return torch.cat(parts, -1).flatten(-2)


def decode(packed: Tensor, head_dim: int, form: StateFormat, channels: Tensor | None) -> Tensor:
    """Unpack states.

    Args:
        packed: `[..., heads, tokens, row_bytes]`, uint8.
        head_dim: channels of a head.
        form: how they were packed.
        channels: as in `encode`.

    Returns:
        `[..., heads, tokens, head_dim]`, float32.
    """
    group = group_of(head_dim)
    rows = _grouped(packed, form.group_bytes(group))
    coded = group * form.bits // 8
    scaled = coded if channels is None else coded + group // (2 * EIGHTH)
    codes, coarse, step, lowest, coarse_step = rows.tensor_split([coded, scaled, scaled + 1, scaled + 2], -1)
    whole = _unpacked(codes, form.bits).float() + lowest.view(torch.int8)
    dense: Tensor = (_turned(whole) * (_steps(step) * turned_together(group) ** -0.5)).flatten(-2)
    if channels is None:
        return dense
    index = channels.unsqueeze(-2).expand(*dense.shape[:-1], -1)
    return dense.scatter_add(-1, index, _coarse_values(_unpacked(coarse, 4), coarse_step))


def turned_together(group: int) -> int:
    """Values that one rotation turns: the largest power of two that divides a group, at most 64.

    >>> turned_together(64), turned_together(80)
    (64, 16)
    """
    return min(GROUP, group & -group)


def _grouped(values: Tensor, size: int) -> Tensor:
    """The last dimension, so many values at a time: `[..., groups, size]`."""
    return values.reshape(*values.shape[:-1], values.shape[-1] // size, size)


def _turned(groups: Tensor) -> Tensor:
    """Groups `[..., group]` times ones and minus ones, `turned_together` values at a time."""
    power = turned_together(groups.shape[-1])
    turned: Tensor = _grouped(groups, power) @ _signs(power, groups.device)
    return turned.reshape(groups.shape)


@lru_cache(maxsize=16)
def _signs(order: int, device: torch.device) -> Tensor:
    """The Walsh-Hadamard matrix of ones and minus ones, `[order, order]`, float32: exact on integers."""
    signs: Tensor = (hadamard(order) * math.sqrt(order)).round().float().to(device)
    return signs


def _steps(step: Tensor) -> Tensor:
    return STEPS.to(step.device)[step.int()]


def _step_byte(least: Tensor) -> Tensor:
    """The byte of the smallest step that is at least so large.

    Raises:
        OverflowError: there is none; NaN is larger than any.
    """
    if not bool((least <= STEPS[-1]).all()):
        raise OverflowError(f"values need a step of {float(least.max()):.3g}, the largest is {STEPS[-1]:.0f}")
    return (torch.log2(least).mul(8).sub(1e-4).ceil() + 136).clamp(0, 255).to(torch.uint8)


def _codes(values: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes `[..., group]`, steps and lowest codes `[..., 1]` of groups of values.

    The levels span the group's values, evenly; where these lie far from zero, the lowest code, a signed
    byte, still reaches them.
    """
    least, most = values.aminmax(dim=-1, keepdim=True)
    reach = torch.maximum(least.abs(), most.abs()) / 127
    step = _step_byte(torch.maximum((most - least) / (2**bits - 1), reach))
    unit = _steps(step)
    middle = (least + most) / 2
    lowest = (middle / unit - (2**bits - 1) / 2).round().clamp(-128, 127)
    codes = ((values / unit).round() - lowest).clamp(0, 2**bits - 1)
    return codes.to(torch.uint8), step, lowest.to(torch.int8)


def _coarse_codes(values: Tensor) -> tuple[Tensor, Tensor]:
    """Coarse codes `[..., values]` and their steps `[..., 1]`."""
    step = _step_byte(values.abs().amax(-1, keepdim=True) / COARSE_TOP)
    codes = (values / _steps(step)).round().clamp(-COARSE_TOP, COARSE_TOP) + COARSE_TOP
    return codes.to(torch.uint8), step


def _coarse_values(codes: Tensor, step: Tensor) -> Tensor:
    """The values of coarse codes `[..., groups, values]`: `[..., groups * values]`."""
    return ((codes.float() - COARSE_TOP) * _steps(step)).flatten(-2)


def _packed(codes: Tensor, bits: int) -> Tensor:
    """Codes `[..., group]` as planes of bytes `[..., group * bits / 8]`."""
    fields, done = [], 0
    for field in FIELDS[bits]:
        taken = (codes >> done) & (2**field - 1)
        planes = taken.unflatten(-1, (8 // field, -1)).unbind(-2)
        fields.append(reduce(or_, (plane << (field * place) for place, plane in enumerate(planes))))
        done += field
    return torch.cat(fields, -1)


def _unpacked(packed: Tensor, bits: int) -> Tensor:
    """Planes of bytes `[..., group * bits / 8]` as codes `[..., group]`, uint8."""
    width = packed.shape[-1]
    codes: list[Tensor] = []
    done = 0
    for field in FIELDS[bits]:
        planes = packed[..., width * done // bits : width * (done + field) // bits]
        each = [(planes >> shift) & (2**field - 1) for shift in range(0, 8, field)]
        codes.append(torch.cat(each, -1) << done)
        done += field
    return reduce(or_, codes)
