"""Speech models on clips: what they write of a sound, told the text word by word, or what each frame says.

Nothing is searched (teacher forcing), so there is a loss and a KL for each token, as with a text. Not here:
the sounds (`evaluation.comparison.sound`).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from svdq_hf.evaluation.comparison.answers import Answers, Observed, Reference, run_over
from svdq_hf.evaluation.comparison.sound import RATE, Clip

START = ("<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>")
"""Of Whisper's tokenizers; another model begins with its decoder's first token."""


class Heard(NamedTuple):
    """A clip as a model gets it.

    Attributes:
        inputs: what the feature extractor makes of the sound.
        told: `[1, tokens]`, int64, what the decoder reads.
        start: tokens before the text.
        wanted: `[text]`, int64, the text and its end.
    """

    inputs: dict[str, Tensor]
    told: Tensor
    start: int
    wanted: Tensor


def heard(clip: Clip, tokenizer: Any, listen: Any, config: Any) -> Heard:
    """A clip as a speech model with a decoder gets it.

    Args:
        clip: sound and text.
        tokenizer: of the model.
        listen: its feature extractor.
        config: of the model.
    """
    known = [one for one in tokenizer.convert_tokens_to_ids(list(START)) if one not in _nothing(tokenizer)]
    start = known or [config.decoder_start_token_id]
    text = tokenizer(" " + clip.text, add_special_tokens=False)["input_ids"]
    longest = getattr(config, "max_target_positions", None) or len(start) + len(text)
    end = config.eos_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    ids = torch.tensor([*start, *text, end])[: longest + 1]
    return Heard(features(clip, listen), ids[None, :-1], len(start), ids[len(start) :])


def _nothing(tokenizer: Any) -> tuple[int | None, ...]:
    return (None, tokenizer.unk_token_id)


def features(clip: Clip, listen: Any) -> dict[str, Tensor]:
    """What a feature extractor makes of a clip, mostly `input_features` `[1, mel, frames]`."""
    return dict(listen(clip.sound.numpy(), sampling_rate=RATE, return_tensors="pt"))


class SpokenClips:
    """Clips that a model with a decoder writes down.

    Args:
        clips: as `heard` returns them.
        about: what they are.
        real: whether the texts are what is said, so that there is a loss.
        reference: keeps the first model's answers.
    """

    counted = "tokens"

    def __init__(self, clips: Sequence[Heard], about: str, real: bool, reference: Reference) -> None:
        self.clips, self.real, self.reference = clips, real, reference
        self.about = f"{about}, {len(clips)} clips"

    def __call__(self, model: Any) -> Observed:
        """Loss, KL and top tokens of a model."""
        return self.reference.observe(run_over(model, self.clips, self._written))

    def _written(self, model: Any, clip: Heard) -> Answers:
        logits = model(**clip.inputs, decoder_input_ids=clip.told).logits[0, clip.start - 1 :]
        return Answers(logits, clip.wanted if self.real else None)


class HeardFrames:
    """Clips of which a model without a decoder says something for each frame (CTC).

    Args:
        clips: as `features` returns them.
        about: what they are.
        reference: keeps the first model's answers.
    """

    counted = "frames"

    def __init__(self, clips: Sequence[dict[str, Tensor]], about: str, reference: Reference) -> None:
        self.clips, self.reference = clips, reference
        self.about = f"{about}, {len(clips)} clips"

    def __call__(self, model: Any) -> Observed:
        """KL and top answers of a model."""
        return self.reference.observe(run_over(model, self.clips, _frames))


def _frames(model: Any, inputs: dict[str, Tensor]) -> Answers:
    return Answers(model(**inputs).logits[0], None)
