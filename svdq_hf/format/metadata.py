"""Metadata of a quantized model: the facts about its layers in a safetensors header, and its tags on the Hub.

Not here: config.json (`config.svdq_config`), and the model card (`hub.card`).
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from svdq_hf.format.files import open_tensors

METADATA_KEY = "svdq_layers"


def layers_metadata(facts: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Metadata for a safetensors header, with the facts measured of each quantized layer.

    Args:
        facts: by the layer's name in files, its "shape" and numbers such as "relative_error".
    """
    return {METADATA_KEY: json.dumps(facts)}


def stored_facts(files: Iterable[str | Path]) -> dict[str, dict[str, Any]]:
    """Shape and facts by layer name, as `layers_metadata` wrote them; empty where no header has them.

    Args:
        files: paths of safetensors files.

    Raises:
        ValueError: see `open_tensors`.
    """
    for file in files:
        with open_tensors(file) as opened:
            text = (opened.metadata() or {}).get(METADATA_KEY)
        try:
            layers = json.loads(text) if text is not None else None
        except (ValueError, RecursionError):
            layers = None
        if isinstance(layers, dict):
            return {name: facts for name, facts in layers.items() if isinstance(facts, dict)}
    return {}


def numbers(facts: Mapping[str, Any]) -> dict[str, float]:
    """Those of `facts` that are finite numbers: a stranger's header can hold anything."""
    return {
        name: float(value)
        for name, value in facts.items()
        if type(value) in (int, float) and abs(value) < 2**53  # NaN is not below, nor is infinity
    }


def tags(bits: int = 4) -> list[str]:
    """Tags of a quantized model on the Hub.

    >>> tags(8)
    ['svdq', '8-bit', 'quantized', 'mixed-precision']
    """
    return ["svdq", f"{bits}-bit", "quantized", "mixed-precision"]
