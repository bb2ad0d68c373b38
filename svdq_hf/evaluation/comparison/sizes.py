"""Size of a model that is compared: bytes on disk, and stored bits per weight.

Not here: layer by layer (`quantize.footprint`).
"""

import math
from typing import NamedTuple

from svdq_hf.evaluation.comparison.contestants import Contestant
from svdq_hf.format.names import weight_of_part
from svdq_hf.quantize.footprint import footprint, read_footprint


class Size(NamedTuple):
    """How large a model is.

    Attributes:
        bytes: of its safetensors files; None: it is in memory.
        bits: stored bits per weight: of the quantized layers, or of all weights where none is quantized.
        dense_share: of the bytes of a quantized model, those that are not quantized; None: it is dense.
    """

    bytes: int | None
    bits: float
    dense_share: float | None


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
    found = read_footprint(one.source.folder)
    return Size(one.source.bytes, found.bits_per_weight, found.dense_bytes / found.total_bytes)


def _in_memory(one: Contestant) -> Size:
    found = footprint(one.model)
    if found.layers:
        return Size(None, found.bits_per_weight, found.dense_bytes / found.total_bytes)
    return Size(None, 8 * found.dense_bytes / found.dense_weights, None)
