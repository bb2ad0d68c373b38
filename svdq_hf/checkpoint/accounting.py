"""Is every tensor of a model's files in what will be written? A class that lacks one would lose it silently.

Known from headers and from the model built without weights, before anything is read: which tensors of the
files a class has no place for, which it is said to ignore, and which it would make up. Not here: how a file's
names become the model's (`integrations.transformers.checkpoint_headers`).
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from torch import nn
from transformers import PreTrainedModel

from svdq_hf.format.names import WeightName
from svdq_hf.integrations.transformers.checkpoint_headers import Checkpoint, read_checkpoint
from svdq_hf.quantize.selection import linear_layers, weights_of

NAMES_SHOWN = 3


class Account(NamedTuple):
    """What a class makes of a folder's tensors; names in files, but for `missing`.

    lost: tensors that it has no place for. ignored: those of them that its family says it does without, or
    that it never saves. missing: its own tensors that no file holds. prefixed: whether the files' names begin
    with the name that models with a head have for their base.
    """

    lost: list[str]
    ignored: list[str]
    missing: list[str]
    prefixed: bool


def account(model: PreTrainedModel, files: Iterable[str | Path], *, packed: bool = False) -> Account:
    """Compare the tensors of safetensors `files` with those of a dense `model`, on the meta device.

    Args:
        model: of the class that is to be loaded.
        files: as `weight_files` gives them.
        packed: whether layers may be quantized in them, by svdq.
    """
    weights = list(_weights(model)) if packed else []
    checkpoint = read_checkpoint(model, weights, files)
    known = set(model.state_dict()) | {name for name, _ in model.named_buffers()}
    known |= {key for weight in weights for key in weight.all_keys()}
    lost: list[str] = []
    ignored: list[str] = []
    for target, entries in checkpoint.sources.items():
        names = [entry.name for entry in entries]
        if target not in known:
            (ignored if _is_ignored(model, target) else lost).extend(names)
        elif target in (model._keys_to_ignore_on_save or ()) and target not in _ties(model):
            ignored.extend(names)
    base = f"{model.base_model_prefix}."
    prefixed = any(entry.name.startswith(base) for entry in checkpoint.entries.values())
    return Account(_once(lost), _once(ignored), _missing(model, checkpoint), prefixed)


def unwritten(
    model: PreTrainedModel,
    files: Iterable[str | Path],
    written: Iterable[str | Path],
    *,
    packed: bool = False,
) -> list[str]:
    """Tensors of safetensors `files` that the class has and that the files `written` of it lack.

    A tie counts as written where one of its tensors is.
    """
    weights = list(_weights(model))
    before = read_checkpoint(model, weights if packed else [], files)
    there = set(read_checkpoint(model, weights, written).sources)
    for one, other in (model.all_tied_weights_keys or {}).items():
        if one in there or other in there:
            there |= {one, other}
    saved = set(model.state_dict()) - set(model._keys_to_ignore_on_save or ())
    missing = (entries for name, entries in before.sources.items() if name in saved and name not in there)
    return _once(entry.name for entries in missing for entry in entries)


def _once(names: Iterable[str]) -> list[str]:
    return sorted(set(names))


def _weights(model: nn.Module) -> Iterator[WeightName]:
    """All weights that may be quantized in a file, embeddings too."""
    for name, layer in linear_layers(model).items():
        yield from weights_of(name, layer)
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            yield WeightName(name, tuple(module.weight.shape))


def _is_ignored(model: PreTrainedModel, name: str) -> bool:
    """Whether loading leaves out a tensor without a word, as transformers decides it."""
    patterns = set(model._keys_to_ignore_on_load_unexpected or ())
    buffers = [name for name, _ in model.named_buffers()]
    patterns |= {
        pattern for end, pattern in _COMPUTED.items() if any(buffer.endswith(end) for buffer in buffers)
    }
    return any(re.search(pattern, name) for pattern in patterns)


_COMPUTED = {"rotary_emb.inv_freq": r"rotary_emb\.inv_freq", "position_ids": r"(^|\.)position_ids$"}
"""Tensors of old files that models with such buffers compute: transformers' own list, in its loading."""


def _ties(model: PreTrainedModel) -> set[str]:
    ties = model.all_tied_weights_keys or {}
    return {*ties.keys(), *ties.values()}


def _missing(model: PreTrainedModel, checkpoint: Checkpoint) -> list[str]:
    """Tensors that the class would make up; of tied ones it is enough that one is there."""
    there = set(checkpoint.sources)
    for one, other in (model.all_tied_weights_keys or {}).items():
        if one in there or other in there:
            there |= {one, other}
    patterns = set(model._keys_to_ignore_on_load_missing or ())
    never = set(model._keys_to_ignore_on_save or ())
    numbers = {name for name, one in model.named_parameters() if one.is_floating_point()}
    wanted = [name for name in model.state_dict() if name in numbers and name not in there | never]
    return [name for name in wanted if not any(re.search(pattern, name) for pattern in patterns)]


def split_dropped(lost: Sequence[str], drop: Sequence[str], where: str | Path) -> tuple[list[str], list[str]]:
    """Those of the `lost` tensors that the user has not named, and those that he has.

    Args:
        lost: names of tensors.
        drop: names of tensors or of modules, or patterns with `*`.
        where: the folder, for the error.

    Raises:
        ValueError: one of `drop` names nothing that would be lost.
    """
    useless = [name for name in drop if not any(_fits(one, name) for one in lost)]
    if useless:
        what = ", ".join(lost[:3]) or "nothing"
        raise ValueError(
            f"{where}: drop={useless[0]!r} fits no tensor that the model has no place for; that is {what}"
        )
    dropped = [one for one in lost if any(_fits(one, name) for name in drop)]
    return [one for one in lost if one not in dropped], dropped


def _fits(tensor: str, name: str) -> bool:
    return tensor == name or tensor.startswith(f"{name}.") or fnmatchcase(tensor, name)


def listed(names: list[str]) -> str:
    """The first few names, with their verb.

    >>> listed(["a"]), listed(["a", "b", "c", "d"])
    ('a is', 'a, b, c and 1 more are')
    """
    more = len(names) - NAMES_SHOWN
    shown = ", ".join(names[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
    return f"{shown} {'is' if len(names) == 1 else 'are'}"
