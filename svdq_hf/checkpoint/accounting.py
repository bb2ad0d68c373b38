"""Account of a folder's tensors: which of them a model's class would lose silently, ignore, or make up.

Known from headers and from the model built without weights, before anything is read. Not here: how a file's
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
    """What a class does with a folder's tensors; names are those in files, except for `missing`.

    Attributes:
        lost: tensors that the class has no place for.
        ignored: tensors without a place that its family declares unneeded, or that it never saves.
        missing: tensors of the class that no file holds; names of the model.
        prefixed: whether names in files begin with the prefix that models with a head give their base model.
    """

    lost: list[str]
    ignored: list[str]
    missing: list[str]
    prefixed: bool


def account(model: PreTrainedModel, files: Iterable[str | Path], *, packed: bool = False) -> Account:
    """Compare the tensors of safetensors files with those of a dense model on the meta device.

    Args:
        model: of the class that is to be loaded.
        files: as `weight_files` gives them.
        packed: whether layers in the files may be quantized by svdq.
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
    """Tensors of the input files that belong to the model and that the output files lack.

    A tied tensor counts as written where any tensor of the tie is.

    Args:
        model: the dense model on the meta device.
        files: safetensors files of the input.
        written: safetensors files of the output.
        packed: whether layers in the input may be quantized by svdq.

    Returns:
        Their names in the input files, sorted.
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
    """Whether transformers' loading leaves out a tensor without a warning."""
    patterns = set(model._keys_to_ignore_on_load_unexpected or ())
    buffers = [name for name, _ in model.named_buffers()]
    patterns |= {
        pattern for end, pattern in _COMPUTED.items() if any(buffer.endswith(end) for buffer in buffers)
    }
    return any(re.search(pattern, name) for pattern in patterns)


_COMPUTED = {"rotary_emb.inv_freq": r"rotary_emb\.inv_freq", "position_ids": r"(^|\.)position_ids$"}
"""Tensors of old files that models with such buffers compute themselves: transformers' own list."""


def _ties(model: PreTrainedModel) -> set[str]:
    ties = model.all_tied_weights_keys or {}
    return {*ties.keys(), *ties.values()}


def _missing(model: PreTrainedModel, checkpoint: Checkpoint) -> list[str]:
    """Tensors that the class would initialize at random; of tied ones one in the files suffices."""
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
    """Split lost tensors into those that the user has not named, and those that the user has.

    Args:
        lost: names of tensors.
        drop: names of tensors or of modules, or patterns with `*`.
        where: the folder, for the error.

    Returns:
        The tensors not named by `drop`, and the others.

    Raises:
        ValueError: one of `drop` matches no lost tensor.
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
    """The first few names, with "is" or "are".

    >>> listed(["a"]), listed(["a", "b", "c", "d"])
    ('a is', 'a, b, c and 1 more are')
    """
    more = len(names) - NAMES_SHOWN
    shown = ", ".join(names[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
    return f"{shown} {'is' if len(names) == 1 else 'are'}"
