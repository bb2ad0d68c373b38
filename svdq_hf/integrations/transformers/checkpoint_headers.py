"""Headers of a checkpoint: which tensors its files hold, under the model's names, before anything is loaded.

transformers loads tensor by tensor: a missing part becomes a line in a log, one of a wrong
dtype is cast, an unexpected one is dropped. So every tensor of every quantized layer is
compared with `part_specs` first (`integrations.transformers.header_checks`), and one error names the layer.
Touches transformers' internals (5.20 to 5.24). Not here: the values of tensors (`format.checks`), and the
names that layers have in files when they are saved (`integrations.transformers.file_names`).
"""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D

from svdq_hf.config import SVDQConfig
from svdq_hf.format.dtypes import DTYPES
from svdq_hf.format.files import open_tensors
from svdq_hf.format.metadata import stored_facts
from svdq_hf.format.names import WeightName, part_key, weight_of_part
from svdq_hf.quantize.budget import BudgetItem
from svdq_hf.quantize.head import dense_names
from svdq_hf.quantize.selection import shape_of

REMEDY = "The checkpoint is damaged or does not fit its config.json; quantize the original model again"


class HeaderEntry(NamedTuple):
    """One tensor of a file.

    Attributes:
        name: in the file.
        shape: in the file.
        dtype: a torch dtype; its name in safetensors where torch has none.
        file: path of the file.
        conversion: transformers' converter that applies to it; None: it is loaded as it is.
        pattern: the source pattern of that converter that the name matches.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype | str
    file: str
    conversion: WeightConverter | None = None
    pattern: str | None = None

    @property
    def whole(self) -> bool:
        """Whether it becomes exactly one tensor of the model, neither split nor joined."""
        return self.conversion is None


@dataclass
class Checkpoint:
    """The tensors of a checkpoint by the model's names, and the facts in its headers.

    Attributes:
        entries: by the name of a tensor of the model, a tensor of the files.
        facts: by the name of a layer in the model, what was measured while quantizing.
        sources: by the name of a tensor of the model, all tensors of the files that become it.
        partners: groups of tensors of the model that come out of one tensor of the files.
    """

    entries: dict[str, HeaderEntry] = field(default_factory=dict)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    sources: dict[str, list[HeaderEntry]] = field(default_factory=dict)
    partners: list[list[str]] = field(default_factory=list)


def read_checkpoint(
    model: PreTrainedModel, weights: Iterable[WeightName], files: Iterable[str | Path]
) -> Checkpoint:
    """Read the headers of safetensors files for a model.

    Args:
        model: the model, on the meta device.
        weights: its weights that may be quantized in the files.
        files: their paths; others than safetensors are skipped.
    """
    files = [file for file in files if str(file).endswith(".safetensors")]
    rename = _Renaming(model, weights)
    result = Checkpoint()
    for file in files:
        with open_tensors(file) as opened:
            for name in opened.keys():  # noqa: SIM118  # not a dict
                part = opened.get_slice(name)
                dtype = DTYPES.get(part.get_dtype(), part.get_dtype())
                targets, pattern = rename(name, converted=dtype != torch.int8)  # packed codes are as they are
                conversion = rename.by_source[pattern] if pattern is not None else None
                entry = HeaderEntry(name, tuple(part.get_shape()), dtype, str(file), conversion, pattern)
                result.entries |= dict.fromkeys(targets, entry)
                for target in targets:
                    result.sources.setdefault(target, []).append(entry)
                if len(targets) > 1:
                    result.partners.append(targets)
    for name, facts in stored_facts(files).items():
        keys = [rename(part_key(name, "salient_rows", stacked=stacked))[0][0] for stacked in (False, True)]
        found = weight_of_part(next((key for key in keys if key in rename.known), keys[0]))
        if found is not None:
            result.facts[found[0]] = facts
    return result


class _Renaming:
    """Translation of a tensor's name in a file to the model's names, as the loader does it.

    Also gives the converter's source pattern that the name matches; None: it is loaded as it is.
    """

    def __init__(self, model: PreTrainedModel, weights: Iterable[WeightName]) -> None:
        conversions = copy.deepcopy(get_model_conversion_mapping(model))  # they note their own use
        self.renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
        self.converters = [c for c in conversions if isinstance(c, WeightConverter)]
        self.by_source = {source: c for c in self.converters for source in c.source_patterns}
        self.prefix = model.base_model_prefix
        self.known = dict.fromkeys(model.state_dict(), True)
        self.known |= {key: True for one in weights for key in one.all_keys()}

    def __call__(self, name: str, *, converted: bool = True) -> tuple[list[str], str | None]:
        rest, converters = (self.prefix, self.known), self.converters if converted else []
        renamed, source = rename_source_key(name, self.renamings, converters, *rest)
        if renamed not in self.known and name in self.known:
            renamed, source = rename_source_key(name, [], [], *rest)
        if source is None:
            return [renamed], None
        targets = self.by_source[source].target_patterns
        return [renamed.replace(targets[0], target) for target in targets], source


def stored_weights(
    model: PreTrainedModel, modules: Mapping[str, nn.Module], checkpoint: Checkpoint, config: SVDQConfig
) -> dict[str, BudgetItem]:
    """The dense weights of some modules, each read from its file when it is called for.

    Args:
        model: the model, on the meta device.
        modules: the modules, by name.
        checkpoint: headers of its files.
        config: how it is quantized.

    Returns:
        Items of a budget by name; none where the config has no budget left to spend.

    Raises:
        ValueError: a weight is not one whole tensor in the files.
    """
    found: dict[str, BudgetItem] = {}
    if config.target_bits is None or config.layer_k is not None:
        return found
    for name, module in modules.items():
        keys = (key for key in dense_names(model, name) if key in checkpoint.entries)
        entry = next((checkpoint.entries[key] for key in keys), None)
        if entry is None or not entry.whole:
            raise ValueError(
                f"target_bits: the files have no tensor for {name} alone, so that its errors cannot be "
                "measured before loading: load the dense model, and call quantize_model(model, config)"
            )
        found[name] = BudgetItem(*shape_of(module), partial(_read, entry, isinstance(module, Conv1D)))
    return found


def _read(entry: HeaderEntry, transposed: bool) -> Tensor:
    with open_tensors(entry.file) as opened:
        weight: Tensor = opened.get_tensor(entry.name)
    return weight.T if transposed else weight
