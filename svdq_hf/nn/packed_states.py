"""Packed states of one layer of a KV cache: its keys, or its values, of which only the last tokens are dense.

New tokens are kept as they come. When `recent` and a block more are there, the oldest whole blocks are packed
(`core.state_codes`), once and for all. What is read is dense: the packed tokens decoded, then the recent ones
bit for bit. The outlier channels are those that are largest in the first block; so they need no data but the
conversation's own.

Not here: what transformers asks of a cache (`integrations.transformers.cache`).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from svdq_hf.core.state_codes import StateFormat, encode, outlier_channels
from svdq_hf.kernels.native.states import decode_into

BLOCK = 32
"""Tokens that are packed together."""


class PackedStates:
    """Keys or values of a layer, `[batch, heads, tokens, head_dim]`, packed but for the last tokens.

    Args:
        form: how states are packed.
        recent: the least number of last tokens that stay as they came.
        name: what the states are, for errors.

    Attributes:
        recent_states: the last tokens, `[batch, heads, tokens, head_dim]`; None before the first.
        packed: the tokens before them, `[batch, heads, tokens, row_bytes]`, uint8; None before the first.
        channels: the outlier channels `[heads, head_dim / 8]` of a form that has them.
    """

    def __init__(self, form: StateFormat, recent: int, name: str = "states") -> None:
        self.form, self.recent, self.name = form, recent, name
        self.clear()

    def clear(self) -> None:
        """Forget all tokens."""
        self.recent_states: Tensor | None = None
        self.packed: Tensor | None = None
        self.channels: Tensor | None = None

    def __len__(self) -> int:
        return sum(part.shape[-2] for part in self._parts())

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(part.untyped_storage().nbytes() for part in self._parts())

    def append(self, states: Tensor) -> None:
        """Add tokens after the last.

        Args:
            states: `[batch, heads, tokens, head_dim]`.
        """
        held = self.recent_states
        self.recent_states = states if held is None else torch.cat([held, states.to(held.dtype)], -2)

    def dense(self) -> Tensor:
        """All tokens: `[batch, heads, tokens, head_dim]`, in the dtype in which they came.

        Raises:
            ValueError: no tokens have come.
        """
        recent = self.recent_states
        if recent is None:
            raise ValueError("nothing has been cached yet")
        if self.packed is None:
            return recent
        before = self.packed.shape[-2]
        states = recent.new_empty(*recent.shape[:2], len(self), recent.shape[-1])
        decode_into(states, self.packed, self.form, self.channels)
        states[:, :, before:] = recent
        return states

    def pack(self) -> None:
        """Pack whole blocks of the oldest tokens that are not among the recent ones.

        Raises:
            ValueError: they are not finite, or too large.
        """
        held = self.recent_states
        count = 0 if held is None else (held.shape[-2] - self.recent) // BLOCK * BLOCK
        if held is None or count <= 0:
            return
        channels = self.channels
        if channels is None and self.form.outliers:
            channels = outlier_channels(held[:, :, :BLOCK])
        try:
            packed = encode(held[:, :, :count], self.form, channels)
        except OverflowError as error:
            raise ValueError(self._why_not(held[:, :, :count])) from error
        self.channels = channels
        self.packed = packed if self.packed is None else torch.cat([self.packed, packed], -2)
        self.recent_states = held[:, :, count:].clone()

    def keep(self, first: int, stop: int) -> None:
        """Drop the tokens before and after some, and free what they took where little is left.

        Where none is left, the outlier channels are forgotten too: the next tokens may be of another text.

        Args:
            first: the first that stays, from 0.
            stop: the one after the last that stays.
        """
        before = 0 if self.packed is None else self.packed.shape[-2]
        if self.packed is not None:
            self.packed = _compact(self.packed[:, :, first:stop]) if first < before else None
        if self.recent_states is not None:
            kept = self.recent_states[:, :, max(first - before, 0) : max(stop - before, 0)]
            self.recent_states = _compact(kept)
        if not len(self):
            self.packed = self.channels = None

    def each(self, change: Callable[[Tensor], Tensor]) -> None:
        """Change what is held: move it, or choose sequences of the batch.

        Args:
            change: of a tensor `[batch, heads, ...]`, whatever its dtype.
        """
        if self.packed is not None:
            self.packed = change(self.packed)
        if self.recent_states is not None:
            self.recent_states = change(self.recent_states)

    def _why_not(self, states: Tensor) -> str:
        """Why states cannot be packed, and what can be done."""
        largest = float(states.abs().max())
        if not math.isfinite(largest):
            dtype = str(states.dtype).removeprefix("torch.")
            remedy = f"load the model in bfloat16 or float32 (these came in {dtype}), or look for its cause"
            return f"{self.name} that are NaN or infinite cannot be packed: {remedy} with a DynamicCache"
        remedy = "take bits=8 or a DynamicCache" if self.form.bits < 8 else "take a DynamicCache"
        return f"{self.name} as large as {largest:.3g} cannot be packed in {self.form.bits} bits: {remedy}"

    def _parts(self) -> list[Tensor]:
        return [part for part in (self.packed, self.recent_states) if part is not None]


def _compact(part: Tensor) -> Tensor:
    """A part of a tensor, by itself where it is less than half of what its storage holds."""
    used = part.numel() * part.element_size()
    return part.clone() if 2 * used < part.untyped_storage().nbytes() else part
