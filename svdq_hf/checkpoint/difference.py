"""Difference of two quantized folders: in their configs, in sizes and bits, and in the error of each layer.

Only headers and config.json are read. Not here: how the models answer (`evaluation`).
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svdq_hf.config import SVDQConfig
from svdq_hf.config.choices import CHOICES
from svdq_hf.format.files import REMEDY
from svdq_hf.quantize.footprint import Footprint, LayerFootprint, read_footprint


@dataclass(frozen=True)
class Difference:
    """What differs between two quantized folders.

    Attributes:
        config: both values of each key of the config that differs.
        before: the first footprint.
        after: the second.
    """

    config: dict[str, tuple[Any, Any]]
    before: Footprint
    after: Footprint

    @property
    def layers(self) -> dict[str, tuple[LayerFootprint | None, LayerFootprint | None]]:
        """Each layer of either folder, in both; None where it is dense."""
        first, second = ({layer.name: layer for layer in one.layers} for one in (self.before, self.after))
        return {name: (first.get(name), second.get(name)) for name in {**first, **second}}

    def to_dict(self) -> dict[str, Any]:
        """Config, totals and layers of both, in types that JSON has."""
        both = {"a": self.before.to_dict(), "b": self.after.to_dict()}
        return {"config": {name: list(values) for name, values in self.config.items()}, **both}


def folder_difference(first: str | Path, second: str | Path) -> Difference:
    """What differs between two quantized folders.

    Args:
        first: of a quantized model.
        second: of another, or of the same quantized in another way.

    Raises:
        ValueError: one is no folder of a quantized model; see `read_footprint`.
    """
    before, after = read_footprint(first), read_footprint(second)
    ours, theirs = _config(first), _config(second)
    config = {key: (ours[key], theirs[key]) for key in ours if ours[key] != theirs[key]}
    return Difference(config, before, after)


def _config(folder: str | Path) -> dict[str, Any]:
    """The keys that say how a folder was quantized, and of which model."""
    file = Path(folder) / "config.json"
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        config = SVDQConfig.from_dict(stored["quantization_config"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: not the config of a quantized model ({error!r}); {REMEDY}") from error
    choices = {name: getattr(config, name) for name, row in CHOICES.items() if row.stored}
    return {key: stored.get(key) for key in ("model_type", "architectures", "dtype")} | choices
