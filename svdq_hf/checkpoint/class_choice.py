"""Choice of the class of a folder's model: the one that config.json names, or one that has its tensors.

Not here: what a class does with a folder's tensors (`checkpoint.accounting`).
"""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import transformers
from transformers import AutoModel, PreTrainedModel, initialization
from transformers.models.auto import modeling_auto

from svdq_hf.checkpoint.accounting import Account
from svdq_hf.format.files import REMEDY

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


def named_class(architectures: object) -> Any:
    """The first transformers class that config.json's `architectures` name; AutoModel where none is one."""
    for name in architectures if isinstance(architectures, list) else ():
        candidate = getattr(transformers, name, None) if isinstance(name, str) else None
        if isinstance(candidate, type) and issubclass(candidate, PreTrainedModel):
            return candidate
    return AutoModel


def built(kind: Any, config: Any) -> Any:
    """A model on the meta device, without weights, as `from_pretrained` builds it first.

    Raises:
        ValueError: the config has numbers that are no sizes, which are named; and what transformers raises.
    """
    build = kind.from_config if kind is AutoModel else kind
    safe = getattr(initialization, "meta_device_safe_creation_ops", nullcontext)  # of newer releases
    try:
        with torch.device("meta"), safe():
            return build(config)
    except Exception as error:
        strange = [f"{key}={value}" for key, value in sizes(config.to_diff_dict()) if value < 1]
        if not strange:
            raise
        name = getattr(kind, "__name__", kind)
        raise ValueError(
            f"{getattr(config, '_name_or_path', '')}/config.json: no {name} can be made of it "
            f"({type(error).__name__}: {error}); {', '.join(strange)} is no size; {REMEDY}"
        ) from error


def sizes(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """The numbers of a config that say how large something is, those of its parts too.

    >>> list(sizes({"hidden_size": 0, "pad_token_id": 0, "text_config": {"num_attention_heads": 4}}))
    [('hidden_size', 0), ('num_attention_heads', 4)]
    """
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from sizes(value)
        elif type(value) is int and _SIZE.search(key):
            yield key, value


_SIZE = re.compile(r"(_size|_dim|_heads|_layers|_positions|_experts)$|^(num|n)_|^d_")


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
