"""A layer of the quantized KV cache for sliding and chunked attention: it keeps what the next token sees.

Not here: what all its layers have in common (`integrations.transformers.cache_layer`).
"""

from typing import Any

from torch import Tensor

from svdq_hf.core.state_codes import StateFormat
from svdq_hf.integrations.transformers.cache_layer import PackedLayer


class PackedSlidingLayer(PackedLayer):
    """A layer of sliding or chunked attention: only the tokens that the next one sees are kept.

    Args:
        form: how states are packed.
        recent: the least number of last tokens that stay as they came.
        sliding_window: tokens that a token sees, itself among them.
    """

    is_sliding = True

    def __init__(self, form: StateFormat, recent: int, sliding_window: int) -> None:
        super().__init__(form, recent)
        self.sliding_window = sliding_window
        self.cumulative_length = 0
        self.record_past = False

    def activate_past_recording(self) -> None:
        """Keep tokens that have left the window until `crop`, which may need them again."""
        self.record_past = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add tokens; see `PackedLayer`.

        Args:
            key_states: `[batch, heads, new, head_dim]`.
            value_states: likewise.
            *args: ignored.
            **kwargs: ignored.

        Returns:
            The keys and values that the new tokens see, `[batch, heads, tokens, head_dim]`.
        """
        new = key_states.shape[-2]
        self.cumulative_length += new
        keys, values = super().update(key_states, value_states)
        seen = self.sliding_window - 1 + new
        return keys[:, :, -seen:], values[:, :, -seen:]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length of the keys that so many new tokens will see, and the place of the first."""
        before = min(self.cumulative_length, self.sliding_window - 1)
        return before + query_length, self.cumulative_length - before

    def get_seq_length(self) -> int:
        """Tokens seen so far, those that are no longer kept included."""
        return self.cumulative_length

    def get_max_length(self) -> int:
        """The window."""
        return self.sliding_window

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()
        self.cumulative_length = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last tokens, then those that have left the window.

        Args:
            tokens_to_remove: minus their number, as transformers counts.

        Raises:
            ValueError: see `check_crop`.
        """
        super().crop(tokens_to_remove)
        self.cumulative_length = max(self.cumulative_length + tokens_to_remove, 0)
        self._slide()

    def check_crop(self, tokens_to_remove: int) -> None:
        """Refuse what `crop` cannot do, before anything is dropped.

        Args:
            tokens_to_remove: of `crop`.

        Raises:
            ValueError: the number is positive; or tokens that have left the window would be needed again.
        """
        super().check_crop(tokens_to_remove)
        if self.cumulative_length >= self.sliding_window and not self.record_past:
            raise ValueError(
                "a layer of sliding attention that has passed its window cannot be cropped: "
                "call cache.activate_past_recording() before the tokens that may be dropped"
            )
        kept, some_stay = len(self.states[0]), self.cumulative_length + tokens_to_remove > 0
        spare = kept - self.sliding_window + 1
        if kept < self.cumulative_length and some_stay and spare + tokens_to_remove < 0:
            raise ValueError(
                f"crop({tokens_to_remove}): at most {spare} tokens can be dropped, as those before have left "
                f"the window of {self.sliding_window}; call cache.activate_past_recording() before them all"
            )

    def _pack(self) -> None:
        if not self.record_past:
            self._slide()
        super()._pack()

    def _slide(self) -> None:
        for one in self.states:
            one.keep(max(len(one) - self.sliding_window + 1, 0), len(one))
