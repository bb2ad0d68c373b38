"""Choice of the class of a folder's model: the one that config.json names, or one that has its tensors.

Not here: what a class does with a folder's tensors (`checkpoint.accounting`), and making the model
(`quantize.empty_model`).
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from transformers import AutoModel, PreTrainedModel
from transformers.models.auto import modeling_auto

from svdq_hf.checkpoint.accounting import Account
from svdq_hf.quantize.empty_model import built

HEADED = (
    "CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MASKED_LM", "SPEECH_SEQ_2_SEQ", "CTC",
    "SEQUENCE_CLASSIFICATION", "TOKEN_CLASSIFICATION", "QUESTION_ANSWERING", "IMAGE_CLASSIFICATION",
    "AUDIO_CLASSIFICATION", "PRETRAINING",
)  # fmt: skip
"""Tasks, by transformers' names of mappings, whose classes are tried where config.json names none."""


class Choice(NamedTuple):
    """A class, and a model of it on the meta device, without weights."""

    kind: Any
    model: Any


def choose(config: Any, accounted: Callable[[Any], Account]) -> Choice | None:
    """The class of a model whose config.json names none.

    A class with a head is chosen where it has all tensors and makes none up, and there is a sign of a head:
    the base model would lose a tensor, or names in the files begin with the base model's prefix. (In some
    families, T5's, names never do, and no sign is needed.)

    Args:
        config: as transformers reads it.
        accounted: returns the account of a model on the meta device.

    Returns:
        The choice; None where not even a class without a head exists.
    """
    try:
        base = Choice(AutoModel, built(AutoModel, config))
    except ValueError:  # transformers' word for a type that has no such class
        return whole_class(config, accounted)
    found, headed = accounted(base.model), whole_class(config, accounted)
    if headed is None:
        return base
    unnamed = headed.model.base_model is headed.model
    return headed if found.lost or found.prefixed or unnamed else base


def whole_class(config: Any, accounted: Callable[[Any], Account]) -> Choice | None:
    """The first class with a head that loses no tensor and makes none up; None: there is none.

    Args:
        config: as transformers reads it.
        accounted: returns the account of a model on the meta device.
    """
    for kind in _headed_classes(config):
        try:
            model = built(kind, config)
        except Exception:  # a class of another task, which this config does not fit
            continue
        found = accounted(model)
        if not found.lost and not found.missing:
            return Choice(kind, model)
    return None


def _headed_classes(config: Any) -> Iterator[type[PreTrainedModel]]:
    """The classes of transformers that put a head on models of this config, each once."""
    seen: set[type] = set()
    for task in HEADED:
        found = getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING").get(type(config), None)
        for kind in found if isinstance(found, tuple | list) else [found]:
            if kind is not None and kind not in seen:
                seen.add(kind)
                yield kind
