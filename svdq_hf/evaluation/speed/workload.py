"""Workload of one model: a forward pass over so many tokens (prefill), and new tokens one by one (decoding).

Inputs are made up, since their values cost no time: random tokens that no config calls special, noise for
pictures and sounds. Not here: models that need more than one of them get text and a picture, others are
refused.
"""

import inspect
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from svdq_hf.evaluation.speed.token_clock import TokenClock

SOUND_PER_TOKEN = 320
"""Samples of sound that wav2vec 2.0 and its kin make one position of: 20 ms at 16 kHz."""
ORDINARY = 1000
"""Token ids below this that are nobody's special tokens are drawn."""
PICTURE_SIDE, CHANNELS, BINS = 224, 3, 80
"""Where a config does not say."""


class Timed(NamedTuple):
    """A timed run: its tokens, and how long they took."""

    tokens: int
    seconds: float


class Workload:
    """What a model is timed with.

    Args:
        model: of transformers, on the CPU or wherever it is to compute.
    """

    def __init__(self, model: Any) -> None:
        self.model = model.eval()
        self.config = model.config
        self.text = self.config.get_text_config()
        self.main = str(model.main_input_name)

    @property
    def writes(self) -> bool:
        """Whether the model generates tokens one by one."""
        return bool(self.model.can_generate())

    def longest(self, tokens: int, room: int = 2) -> int:
        """As many of some tokens as the model has positions for.

        Args:
            tokens: that are wanted.
            room: positions that stay free: RoBERTa never uses its first two.
        """
        most = getattr(self.text, "max_position_embeddings", None)
        return max(1, min(tokens, most - room)) if isinstance(most, int) and most > 0 else tokens

    def inputs(self, tokens: int) -> dict[str, Tensor]:
        """Inputs of one row, by name: ids `[1, tokens]`, or noise of the shape that the config says.

        A causal or masked model reads `tokens` tokens; sound is as long as gives about as many positions
        (Whisper's is always 30 s); a picture has the size that the config says.

        Args:
            tokens: the length.

        Raises:
            ValueError: the model reads something else.
        """
        for inputs in self._guesses(tokens):
            try:
                with torch.inference_mode():
                    self.model(**inputs)
            except Exception as error:  # of a model that wants another input as well
                refused = error
            else:
                return inputs
        told = " ".join(str(refused).split())
        raise ValueError(f"{type(self.model).__name__} takes no input that could be made up ({told})")

    def _guesses(self, tokens: int) -> Iterator[dict[str, Tensor]]:
        first = {self.main: self._one(self.main, tokens)}
        if self.config.is_encoder_decoder:
            first["decoder_input_ids"] = self._ids(1)
        yield first
        other = "pixel_values" if self.main == "input_ids" else "input_ids"
        yield {**first, other: self._one(other, tokens)}

    def _one(self, name: str, tokens: int) -> Tensor:
        if name == "input_ids":
            return self._ids(tokens)
        if name == "pixel_values":
            side = self._said("image_size", PICTURE_SIDE)
            return torch.randn(1, self._said("num_channels", CHANNELS), *_pair(side))
        if name == "input_features":
            frames = 2 * self._said("max_source_positions", 0) or 2 * tokens
            return torch.randn(1, self._said("num_mel_bins", BINS), frames)
        return torch.randn(1, SOUND_PER_TOKEN * (tokens + 1))

    def _ids(self, tokens: int) -> Tensor:
        """Token ids `[1, tokens]`, the same each time."""
        configs = (self.config, self.text)
        named = [value for config in configs for key, value in vars(config).items() if _is_id(key)]
        special = {value for value in named if isinstance(value, int)}
        ordinary = [one for one in range(min(ORDINARY, self.text.vocab_size)) if one not in special] or [0]
        drawn = torch.randint(len(ordinary), (1, tokens), generator=torch.Generator().manual_seed(0))
        return torch.tensor(ordinary)[drawn]

    def _said(self, name: str, otherwise: Any) -> Any:
        """A value of the config or of one nested in it."""
        nested = [one for one in vars(self.config).values() if hasattr(one, "to_diff_dict")]
        found = [getattr(config, name, None) for config in (self.config, *nested)]
        return next((one for one in found if one is not None), otherwise)

    def prefill(self, inputs: dict[str, Tensor]) -> Timed:
        """One forward pass as `generate` makes it of a prompt: of the logits it asks for the last alone.

        Args:
            inputs: `[1, ...]`, as `inputs` makes them.

        Returns:
            The rows that its linear layers multiply, which are the tokens of a text, the patches of a
            picture, the frames of a sound; and the time.
        """
        tokens = inputs[self.main].shape[1] if self.main == "input_ids" else self._rows(inputs)
        last = {"logits_to_keep": 1} if self._keeps_last else {}
        with torch.inference_mode():
            started = time.perf_counter()
            self.model(**inputs, **last)
            return Timed(tokens, time.perf_counter() - started)

    @cached_property
    def _keeps_last(self) -> bool:
        return self.writes and "logits_to_keep" in inspect.signature(self.model.forward).parameters

    def _rows(self, inputs: dict[str, Tensor]) -> int:
        with rows_seen(self.model) as seen, torch.inference_mode():
            self.model(**inputs)
        return max(seen, default=1)

    def decode(
        self, inputs: dict[str, Tensor], new_tokens: int, begin: Callable[[], None] = lambda: None
    ) -> Timed | None:
        """New tokens by greedy `generate`, timed from the first, which is prefill's, to the last.

        Args:
            inputs: `[1, ...]`, as `inputs` makes them.
            new_tokens: at least 2.
            begin: called when the time begins to count, which is when the prompt is read.

        Returns:
            One token less than that, and the time; None: the model writes none.
        """
        if not self.writes:
            return None
        clock = TokenClock(begin)
        asked = {name: value for name, value in inputs.items() if name != "decoder_input_ids"}
        self.model.generate(
            **asked,
            **({"attention_mask": torch.ones_like(asked[self.main])} if self.main == "input_ids" else {}),
            do_sample=False,
            num_beams=1,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            stopping_criteria=[clock],
        )
        times = clock.times
        return Timed(len(times) - 1, times[-1] - times[0]) if len(times) > 1 else None


@contextmanager
def rows_seen(model: nn.Module) -> Iterator[list[int]]:
    """Context manager: how many rows `[..., in]` each call of a linear layer multiplies, filled in its block.

    Args:
        model: the model; a quantized layer counts as the dense one.
    """
    seen: list[int] = []
    linear = [one for one in model.modules() if isinstance(getattr(one, "in_features", None), int)]
    hooks = [
        one.register_forward_pre_hook(lambda _, args: seen.append(args[0].numel() // args[0].shape[-1]))
        for one in linear
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _is_id(key: str) -> bool:
    return key.endswith(("_token_id", "_token_index"))


def _pair(side: Any) -> tuple[int, int]:
    return tuple(side) if isinstance(side, list | tuple) else (side, side)
