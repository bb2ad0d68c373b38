"""Models that are compared: folders, names on the Hub, models in memory, and configs to be made on the way.

Not here: what they are measured on (`evaluation.comparison.measures`), and how a comparison runs
(`evaluation.comparison.run`).
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain, count
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel

from svdq_hf.checkpoint.load import load_complete
from svdq_hf.checkpoint.quantize import quantize_source
from svdq_hf.checkpoint.source import Source
from svdq_hf.config import SVDQConfig
from svdq_hf.config.presets import PRESETS
from svdq_hf.evaluation.comparison.labels import label
from svdq_hf.evaluation.speed.memory import check_fits
from svdq_hf.format.files import weight_files
from svdq_hf.quantize.input_statistics import check_loss

Model: TypeAlias = str | Path | nn.Module
"""What can be compared: a folder, a name on the Hub, or a model in memory."""


@dataclass(frozen=True)
class Contestant:
    """A model to be compared.

    Attributes:
        name: in tables; no two have the same.
        source: its folder; None: it is in memory, or not made yet.
        model: in memory; None: it is loaded when it is needed.
        config: how it is made of the reference; None: it is there.
    """

    name: str
    source: Source | None = None
    model: Any = None
    config: SVDQConfig | None = None

    @property
    def where(self) -> str:
        """Its folder or name, for messages."""
        return self.name if self.source is None or self.config is not None else str(self.source)

    @property
    def is_there(self) -> bool:
        """Whether it need not be made first."""
        return self.source is not None or self.model is not None

    @property
    def given_folder(self) -> str | None:
        """The folder that a user gave; None: it is in memory, on the Hub, or was made on the way."""
        if self.source is None or self.source.name or self.config is not None or self.model is not None:
            return None
        return str(self.source.folder)

    @property
    def quantization(self) -> dict[str, Any] | None:
        """The quantization_config that it has; None: it is dense."""
        if self.config is not None:
            return dict(self.config.to_dict())
        if self.source is not None:
            stored = self.source.stored.get("quantization_config")
            return stored if isinstance(stored, dict) else None
        kept = getattr(self.model.config, "quantization_config", None)
        return None if kept is None else dict(kept if isinstance(kept, dict) else kept.to_dict())

    def empty(self) -> Any:
        """The model, possibly without weights."""
        return self.model if self.model is not None or self.source is None else self.source.empty

    def tokenizer(self) -> Any:
        """Its tokenizer; None: it has none.

        Raises:
            ValueError: its files are damaged, or need code of their author's.
        """
        where = self.model.name_or_path if self.source is None else self.source.folder
        try:
            found = AutoTokenizer.from_pretrained(where, trust_remote_code=False)
        except (OSError, TypeError, ValueError):
            return None
        return found if len(found) > 1 else None  # transformers makes an empty one where there is none

    def loaded(self) -> Any:
        """The model in memory, dense parts in float32, ready to run.

        Raises:
            ValueError: it lacks a tensor, cannot be loaded, or does not fit into memory.
        """
        if self.model is not None:
            return self.model.eval()
        if self.source is None:
            raise ValueError(f"{self.name}: is not made yet")
        if self.quantization is None:
            check_fits(self.where, sum(math.prod(place.shape) for place in self.source.places.values()))
        kind, folder = self.source.kind, self.source.folder
        model, _ = load_complete(kind, folder, heads=False, dtype=torch.float32)
        return model.eval()

    def made(self, of: Source, folder: Path) -> "Contestant":
        """The contestant, quantized into a folder where it is not there yet.

        Args:
            of: the reference.
            folder: to write.

        Raises:
            ValueError: the reference cannot be quantized so.
        """
        if self.config is None:
            return self
        quantize_source(of, folder, self.config)
        return replace(self, source=Source.resolve(folder, packed=True))


def entrants(reference: Model, others: Sequence[Model | SVDQConfig]) -> list[Contestant]:
    """The contestants, the reference first; without others, what `SVDQConfig()` makes of it.

    Args:
        reference: a folder, a name on the Hub, or a model in memory.
        others: the same; or configs, to quantize the reference with.

    Raises:
        TypeError: one of them is no such thing.
        ValueError: a folder is no model, or is given twice; or a quantized reference is to be quantized.
    """
    first = entrant(reference)
    others = others or ([SVDQConfig()] if first.quantization is None else [])
    if not others:
        raise ValueError(
            f"{first.where}: quantized already, and there is nothing to compare it with; give the original "
            f"first: svdq compare ORIGINAL {first.where}"
        )
    if first.quantization is not None and any(isinstance(other, SVDQConfig) for other in others):
        raise ValueError(
            f"{first.where}: quantized already; quantize the original: svdq compare ORIGINAL ..."
        )
    for other in others:
        if isinstance(other, SVDQConfig) and other.needs_batches:
            raise ValueError(
                f"{label(other)}: needs data: svdq quantize MODEL OUT --calibration FILE, with the same "
                "choices, then svdq compare MODEL OUT; or, without data, --error-feedback synthetic"
            )
        if isinstance(other, SVDQConfig):
            check_loss(first.empty(), other)
    found = [first, *map(entrant, others)]
    _check_once(found)
    return _told_apart(found)


def entrant(model: Model | SVDQConfig) -> Contestant:
    """One contestant, not loaded yet.

    Args:
        model: see `entrants`.

    Raises:
        TypeError: it is no folder, name, model or config.
        ValueError: the folder is no model's.
        OSError: the Hub does not have it, or cannot be reached.
    """
    if isinstance(model, SVDQConfig):
        return Contestant(label(model), config=model)
    if isinstance(model, PreTrainedModel):
        return Contestant(type(model).__name__, model=model)
    if isinstance(model, nn.Module) or not isinstance(model, str | Path):
        raise TypeError(
            f"compare takes folders, names on the Hub, transformers models and SVDQConfigs, no "
            f"{type(model).__name__}"
        )
    preset = str(model).replace("-", "_").lower()
    if preset in PRESETS and not Path(model).exists():
        raise ValueError(
            f"{model}: no such folder; made on the way: --preset {preset} (in Python SVDQConfig.{preset}())"
        )
    source = Source.resolve(model, packed=True)
    _ = source.stored, weight_files(source.folder)  # which say what is missing
    return Contestant(source.folder.resolve().name if source.name is None else source.name, source)


def _check_once(found: Sequence[Contestant]) -> None:
    places = Counter(one.source.folder.resolve() for one in found if one.source is not None)
    twice = [str(place) for place, times in places.items() if times > 1]
    if twice:
        raise ValueError(f"{twice[0]}: given twice; compare it with another folder, or with --preset best")
    made = Counter(one.name for one in found if one.config is not None)
    same = [name for name, times in made.items() if times > 1]
    if same:
        raise ValueError(f"{same[0]}: asked for twice; give other choices, or leave one out")


def _told_apart(found: list[Contestant]) -> list[Contestant]:
    """Contestants with names that differ: folders of one name with the folder above, others numbered."""
    counts = Counter(one.name for one in found)
    names: list[str] = []
    for one in found:
        parts = one.source.folder.resolve().parts if one.source is not None else ()
        name = "/".join(parts[-2:]) if counts[one.name] > 1 and parts else one.name
        tries = chain([name], (f"{name} ({number})" for number in count(2)))
        names.append(next(tried for tried in tries if tried not in names))
    return [replace(one, name=name) for one, name in zip(found, names, strict=True)]
