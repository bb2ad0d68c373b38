"""A model without weights, on the meta device: what a config says that a model is, before a file is read.

Not here: which class it is where config.json names none (`checkpoint.class_choice`).
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
import transformers
from transformers import AutoModel, PreTrainedModel, initialization

from svdq_hf.format.files import REMEDY


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
