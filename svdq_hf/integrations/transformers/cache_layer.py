"""A layer of the quantized KV cache, by the protocol of transformers' own (`DynamicLayer`).

New tokens are read as they came, and packed afterwards. Not here: the cache that these are the layers of
(`integrations.transformers.cache`), layers that see a window (`integrations.transformers.sliding_layer`), and
which tokens are packed (`nn.packed_states`).
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from svdq_hf.core.state_codes import StateFormat
from svdq_hf.nn.packed_states import PackedStates


class PackedLayer(DynamicLayer):  # type: ignore[misc]
    """A layer of full attention: all its tokens are kept, all but the last ones packed.

    Args:
        form: how states are packed.
        recent: the least number of last tokens that stay as they came.
    """

    is_croppable = True

    def __init__(self, form: StateFormat, recent: int) -> None:
        # not the parents': they set keys and values, which are read off the packed states here
        self.is_initialized = False
        self.states = (PackedStates(form, recent, "keys"), PackedStates(form, recent, "values"))

    @property
    def keys(self) -> Tensor | None:
        """All keys that are kept, dense: `[batch, heads, tokens, head_dim]`; None before the first."""
        return self.states[0].dense() if self.is_initialized else None

    @property
    def values(self) -> Tensor | None:
        """All values that are kept, dense: `[batch, heads, tokens, head_dim]`; None before the first."""
        return self.states[1].dense() if self.is_initialized else None

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(one.nbytes for one in self.states)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Check what will be cached, and note its device.

        Args:
            key_states: `[batch, heads, tokens, head_dim]`.
            value_states: likewise; its heads may have another size.

        Raises:
            ValueError: a size of heads that cannot be packed.
        """
        for states in (key_states, value_states):
            _check_head(states.shape[-1], self.states[0].form)
        self.device = key_states.device
        self.is_initialized = True
        for one, states in zip(self.states, (key_states, value_states), strict=True):
            one.append(states[:, :, :0])

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add tokens; the new ones are read as they came, and packed afterwards.

        Args:
            key_states: `[batch, heads, new, head_dim]`.
            value_states: likewise.
            *args: ignored.
            **kwargs: ignored.

        Returns:
            All keys and values `[batch, heads, tokens, head_dim]`.

        Raises:
            ValueError: a size of heads, or a state, that cannot be packed.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        for one, states in zip(self.states, (key_states, value_states), strict=True):
            one.append(states)
        keys, values = (one.dense() for one in self.states)
        self._pack()
        return keys, values

    def get_seq_length(self) -> int:
        """Tokens seen so far."""
        return len(self.states[0])

    def reset(self) -> None:
        """Forget all tokens."""
        self.is_initialized = False
        for one in self.states:
            one.clear()

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last tokens.

        Args:
            tokens_to_remove: minus their number, as transformers counts.

        Raises:
            ValueError: see `check_crop`.
        """
        self.check_crop(tokens_to_remove)
        for one in self.states:
            one.keep(0, max(len(one) + tokens_to_remove, 0))

    def check_crop(self, tokens_to_remove: int) -> None:
        """Refuse what `crop` cannot do, before anything is dropped.

        Args:
            tokens_to_remove: of `crop`.

        Raises:
            ValueError: the number is positive, which transformers would not take either.
        """
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop({tokens_to_remove}): minus the number of tokens to drop, as crop({-tokens_to_remove})"
            )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Choose a sequence for each place of the batch, as beam search does.

        Args:
            beam_idx: `[batch]`, int64.
        """
        self._each(lambda states: states.index_select(0, beam_idx.to(states.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence."""
        self._each(lambda states: states.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some sequences.

        Args:
            indices: `[batch]`, places or booleans.
        """
        self._each(lambda states: states[indices.to(states.device)])

    def offload(self) -> None:
        """Move what is held to the CPU."""
        self._each(lambda states: states.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move what is held back to where it is used."""
        self._each(lambda states: states.to(self.device, non_blocking=True))

    def _pack(self) -> None:
        with torch.no_grad():
            for one in self.states:
                one.pack()

    def _each(self, change: Any) -> None:
        for one in self.states:
            one.each(change)


def _check_head(head_dim: int, form: StateFormat) -> None:
    """Raise ValueError for a size of heads that cannot be packed."""
    least = 16 if form.outliers else 8
    if head_dim % least:
        raise ValueError(
            f"heads of {head_dim} channels: packed are multiples of {least}"
            + ("; bits=4 takes multiples of 8" if form.outliers and head_dim % 8 == 0 else "")
        )
