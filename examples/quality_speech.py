"""Speech for bench_quality.py: a text read aloud by espeak-ng, which a speech model must write down again.

The model is told the text word by word (teacher forcing), so a cell has a loss and a KL for each token, as
with a text; nothing is searched. Needs the program espeak-ng (Debian's package of that name).
"""

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from svdq_hf.calibration.texts import read_text
from svdq_hf.evaluation.comparison.log_probabilities import divergences, log_probabilities
from svdq_hf.evaluation.comparison.sound import clips, spoken
from svdq_hf.evaluation.comparison.speech import START


class SpeechTask:
    """The start of a text as speech, clip by clip; its end for methods that need data."""

    def __init__(self, file: Path, tokenizer: Any, listen: Any, tokens: int, held: int) -> None:
        """listen: a feature extractor; tokens, held: at least so many are scored, and held."""
        self.name = f"{file.stem} spoken, {tokens} tokens"
        pieces = clips(read_text(file))
        sizes = [len(tokenizer(piece, add_special_tokens=False)["input_ids"]) for piece in pieces]
        scored, end = enough(sizes, tokens), enough(sizes[::-1], held)
        if scored + end > len(pieces):
            raise ValueError(f"{file}: {sum(sizes)} tokens, fewer than {tokens} to score and {held} to hold")
        self.batches = [heard(piece, tokenizer, listen) for piece in pieces[:scored]]
        self.held = [heard(piece, tokenizer, listen) for piece in pieces[len(pieces) - end :]]
        self.last = torch.tensor([tokenizer.convert_tokens_to_ids("<|endoftext|>")])
        self.reference: list[Tensor] = []

    def __call__(self, model: Any) -> dict[str, Any]:
        """Mean loss and KL in nats over the text's tokens and each clip's end; the share that is right."""
        known, loss, divergence, right, n = bool(self.reference), 0.0, 0.0, 0, 0
        for place, batch in enumerate(self.batches):
            logits = model(**batch).logits[0, len(START) - 1 :]
            wanted = torch.cat([batch["decoder_input_ids"][0, len(START) :], self.last])
            loss += float(F.cross_entropy(logits, wanted, reduction="sum"))
            right, n = right + int((logits.argmax(-1) == wanted).sum()), n + wanted.numel()
            if known:
                divergence += float(divergences(self.reference[place], logits).sum())
            else:
                self.reference.append(log_probabilities(logits))
        return {"n": n, "loss": loss / n, "kl": divergence / n, "metrics": {"right": right / n}}

    def calibration(self) -> list[Any]:
        """Clips of the text's end."""
        return self.held

    def sample(self) -> list[Any]:
        """The first clip."""
        return self.batches[:1]


def enough(sizes: Iterable[int], total: int) -> int:
    """How many of the first sizes make up the total.

    >>> enough([3, 3, 3], 5)
    2
    """
    sums: Iterator[int] = itertools.accumulate(sizes, initial=0)
    return sum(1 for _ in itertools.takewhile(lambda known: known < total, sums))


def heard(text: str, tokenizer: Any, listen: Any) -> dict[str, Tensor]:
    """What a model gets of a spoken text: `input_features` `[1, mel, frames]`, and the text itself."""
    features = listen(spoken(text).numpy(), sampling_rate=16000, return_tensors="pt").input_features
    ids = tokenizer.convert_tokens_to_ids(list(START))
    ids += tokenizer(" " + text, add_special_tokens=False)["input_ids"]
    return {"input_features": features, "decoder_input_ids": torch.tensor([ids])}
