"""Choice of what models are measured on: the measure of their kind, made from the user's choices.

Not here: the kinds (`evaluation.comparison.kinds`), the measures themselves (`evaluation.comparison.windows`,
`evaluation.comparison.speech` and their neighbours).
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoFeatureExtractor

from svdq_hf.calibration.texts import read_text
from svdq_hf.evaluation.comparison import request, sound
from svdq_hf.evaluation.comparison.answers import Measure, Reference
from svdq_hf.evaluation.comparison.kinds import EMBEDDINGS, OF_SPEECH
from svdq_hf.evaluation.comparison.masked import MaskedWindows
from svdq_hf.evaluation.comparison.sentences import (
    LONGEST,
    SentenceEmbeddings,
    SentenceLabels,
    encoded,
    sentences_of,
)
from svdq_hf.evaluation.comparison.sound import Clip
from svdq_hf.evaluation.comparison.speech import HeardFrames, SpokenClips, features, heard
from svdq_hf.evaluation.comparison.windows import OWN_TEXT, CausalWindows, HalvedWindows
from svdq_hf.evaluation.tasks.perplexity import context_of, longest_context, token_ids

LETTERS = 40
"""Of a text are looked at for each token that is scored; no tokenizer has tokens so long in the mean."""
HALVES = 256
"""Most tokens of a window for an encoder with a decoder."""
FEW = 6
"""Clips of which every frame counts."""
TONES = "tones (for a loss: espeak-ng, or --data DIR)"


@dataclass(frozen=True)
class Measuring:
    """What a measure is made of.

    Attributes:
        model: of the reference; it may be without weights.
        folder: of the reference; None: it is in memory only.
        tokenizer: of the reference.
        choices: of the user.
        reference: keeps the reference's answers.
    """

    model: Any
    folder: Path | None
    tokenizer: Any
    choices: request.Choices
    reference: Reference

    @property
    def file(self) -> Path:
        """The text's file."""
        return Path(self.choices.get("text") or OWN_TEXT)

    @property
    def told(self) -> str:
        """The text in a few words."""
        return "the text that comes along" if self.file == OWN_TEXT else self.file.name

    @property
    def limit(self) -> int:
        """Most tokens that are scored."""
        return self.choices.get("tokens") or request.TOKENS

    def ids(self) -> Tensor:
        """The start of the text, `[tokens]`, int64."""
        start = read_text(self.file)[: LETTERS * self.limit]  # a book need not be cut into tokens whole
        return token_ids(start, self.tokenizer, self.limit)

    def context(self) -> int:
        """Tokens that a model sees at once."""
        asked, longest = self.choices.get("context"), longest_context(self.model)
        return context_of(self.model, asked) if asked else min(request.CONTEXT, longest or request.CONTEXT)

    def sentences(self) -> list[dict[str, Tensor]]:
        """The text's sentences as inputs: token ids and masks, each `[1, tokens]`, int64."""
        longest = min(LONGEST, longest_context(self.model) or LONGEST)
        return encoded(sentences_of(read_text(self.file)), self.tokenizer, self.limit, longest)


def measure_of(given: Measuring, kind: str) -> Measure:
    """The measure for a kind of models.

    Args:
        given: what it is made of.
        kind: of the models.

    Raises:
        ValueError: the user's choices do not fit the kind, or the text is too short.
    """
    _check_fits(given, kind)
    task = given.choices.get("task")
    if task is not None:
        return _task(given, task)
    made = _MAKERS[kind](given)
    if kind not in OF_SPEECH:
        made.about = f"{given.told}, {made.about}"
    return made


def _check_fits(given: Measuring, kind: str) -> None:
    name = type(given.model).__name__
    if given.choices.get("task") is not None and kind != "labels":
        raise ValueError(f"--task: for classifiers of texts, and {name} is none; leave it out")
    if given.choices.get("data") is not None and not given.choices.get("task") and kind not in OF_SPEECH:
        raise ValueError(f"--data: goes with --task, or with a speech model; {name} is none; leave it out")
    if given.choices.get("speech") and kind not in OF_SPEECH:
        raise ValueError(f"--speech: {name} is no speech model; leave it out")
    if given.choices.get("text") is not None and kind in OF_SPEECH and not sound.can_read_aloud():
        raise ValueError(
            f"--text: {name} is a speech model, and the text must be read aloud by espeak-ng, which is not "
            "installed (apt-get install espeak-ng); or give recordings: --data DIR"
        )


def check_tokenizer(found: Any, wanted: Any, where: str, reference: str) -> None:
    """Refuse a tokenizer that cuts a text into other tokens than the reference's does.

    Args:
        found: of the model.
        wanted: of the reference.
        where: folder of the model.
        reference: folder of the reference.

    Raises:
        ValueError: it says both folders.
    """
    text = read_text(OWN_TEXT)
    if found(text, verbose=False)["input_ids"] != wanted(text, verbose=False)["input_ids"]:
        raise ValueError(
            f"{where}: its tokenizer is another than that of {reference}, so their losses are of different "
            "tokens; compare a model with what was made of it"
        )


def _task(given: Measuring, task: str) -> Measure:
    from svdq_hf.evaluation.comparison.classifier import TaskExamples

    return TaskExamples(task, given.tokenizer, given.choices.get("data"), given.reference)


def _causal(given: Measuring) -> Measure:
    first = given.tokenizer.bos_token_id
    return CausalWindows(given.ids(), given.context(), first, given.reference)


def _halves(given: Measuring) -> Measure:
    return HalvedWindows(given.ids(), min(given.context(), HALVES), given.reference)


def _masked(given: Measuring) -> Measure:
    return MaskedWindows(given.ids(), given.context(), given.tokenizer, given.reference)


def _labels(given: Measuring) -> Measure:
    return SentenceLabels(given.sentences(), given.reference)


def _embeddings(given: Measuring) -> Measure:
    first = given.folder is not None and takes_first_token(given.folder)
    return SentenceEmbeddings(given.sentences(), first, given.reference)


def takes_first_token(folder: Path) -> bool:
    """Whether a sentence-transformers folder says that a sentence's vector is its first token's."""
    for file in sorted(folder.glob("*_Pooling/config.json")):
        try:
            return bool(json.loads(file.read_text(encoding="utf-8")).get("pooling_mode_cls_token"))
        except (ValueError, AttributeError):
            return False
    return False


def _speech(given: Measuring) -> Measure:
    listen, (clips, about) = _listener(given), _clips(given)
    found, left = [], given.choices.get("tokens") or request.TOKENS_SPOKEN
    for clip in clips:
        found.append(heard(clip, given.tokenizer, listen, given.model.config))
        left -= found[-1].wanted.numel()
        if left <= 0:
            break
    return SpokenClips(found, about, about != TONES, given.reference)


def _frames(given: Measuring) -> Measure:
    listen, (clips, about) = _listener(given), _clips(given)
    return HeardFrames([features(clip, listen) for clip in islice(clips, FEW)], about, given.reference)


def _listener(given: Measuring) -> Any:
    where = given.folder or given.model.name_or_path
    return AutoFeatureExtractor.from_pretrained(where, trust_remote_code=False)


def _clips(given: Measuring) -> tuple[Iterator[Clip], str]:
    """The clips, each made when it is needed, and what they are."""
    data = given.choices.get("data")
    if data is not None:
        return iter(sound.recordings(Path(data))), Path(data).name
    texts = sound.clips(read_text(given.file))
    if not sound.can_read_aloud():
        return (Clip(sound.tones(number), text) for number, text in enumerate(texts)), TONES
    return (Clip(sound.spoken(text), text) for text in texts), f"{given.told} spoken"


_MAKERS: dict[str, Callable[[Measuring], Measure]] = {
    "speech": _speech,
    "frames": _frames,
    "labels": _labels,
    "token labels": _labels,
    "halves": _halves,
    "causal": _causal,
    "masked": _masked,
    EMBEDDINGS: _embeddings,
}
