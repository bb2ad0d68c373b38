"""Size of a model that is compared: bytes on disk, and stored bits per weight.

Not here: layer by layer (`quantize.footprint`).
"""

import math
from typing import NamedTuple

from svdq_hf.evaluation.comparison.contestants import Contestant
from svdq_hf.format.names import weight_of_part
from svdq_hf.quantize.footprint import Footprint, footprint, read_footprint
from svdq_hf.quantize.footprint_text import shrinks


class Size(NamedTuple):
    """How large a model is.

    Attributes:
        bytes: of its safetensors files; None: it is in memory.
        bits: stored bits per weight: of the quantized layers, or of all weights where none is quantized.
        dense_share: of the bytes of a quantized model, those that are not quantized; None: it is dense.
        shrinks: the option that would quantize the largest of those, or nothing.
    """

    bytes: int | None
    bits: float
    dense_share: float | None
    shrinks: str = ""


def size_of(one: Contestant) -> Size:
    """The size of a contestant.

    Args:
        one: in a folder, or in memory.
    """
    if one.source is None:
        return _in_memory(one)
    if not any(weight_of_part(name) for name in one.source.places):
        weights = sum(math.prod(place.shape) for place in one.source.places.values())
        stored = sum(place.size for place in one.source.places.values())
        return Size(one.source.bytes, 8 * stored / weights, None)
    return _of_layers(read_footprint(one.source.folder), one.source.bytes)


def _of_layers(found: Footprint, stored: int | None) -> Size:
    dense = found.dense_bytes / found.total_bytes
    return Size(stored, found.bits_per_weight, dense, shrinks(found, options=True))


def _in_memory(one: Contestant) -> Size:
    found = footprint(one.model)
    if found.layers:
        return _of_layers(found, None)
    return Size(None, 8 * found.dense_bytes / found.dense_weights, None)
