"""Of which class is the model in a folder? Of the one that config.json names, or of one that has its tensors.

Not here: what a class makes of a folder's tensors (`accounting`).
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import transformers
from transformers import AutoModel, PreTrainedModel, initialization
from transformers.models.auto import modeling_auto

from svdq_hf.checkpoint.accounting import Account

HEADED = (
    "CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MASKED_LM", "SPEECH_SEQ_2_SEQ", "CTC",
    "SEQUENCE_CLASSIFICATION", "TOKEN_CLASSIFICATION", "QUESTION_ANSWERING", "IMAGE_CLASSIFICATION",
    "AUDIO_CLASSIFICATION", "PRETRAINING",
)  # fmt: skip
"""Tasks, as transformers names its mappings, whose classes are tried where config.json names none."""


class Choice(NamedTuple):
    """A class, and the model of it on the meta device, without weights."""

    kind: Any
    model: Any


def named_class(architectures: object) -> Any:
    """The first transformers class of a list of names; AutoModel where none is one, or it is no list."""
    for name in architectures if isinstance(architectures, list) else ():
        candidate = getattr(transformers, name, None) if isinstance(name, str) else None
        if isinstance(candidate, type) and issubclass(candidate, PreTrainedModel):
            return candidate
    return AutoModel


def built(kind: Any, config: Any) -> Any:
    """A model on the meta device, without weights, as `from_pretrained` builds it first."""
    build = kind.from_config if kind is AutoModel else kind
    safe = getattr(initialization, "meta_device_safe_creation_ops", nullcontext)  # of newer releases
    with torch.device("meta"), safe():
        return build(config)


def choose(config: Any, accounted: Callable[[Any], Account]) -> Choice | None:
    """The class of a model whose config.json names none; None: there is not even one without a head.

    A class with a head is taken where it has all tensors and makes none up; and where the base model would
    lose one, or the files' names say that there was a head: then they begin with a name for the base model,
    but in families (T5's) whose names never do.

    Args:
        config: as transformers reads it.
        accounted: what a model, on the meta device, makes of the files.
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
    """The first class with a head that loses no tensor and makes none up."""
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
