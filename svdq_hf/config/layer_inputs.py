"""What single layers do with their inputs before rounding them, by the ends of their names.

A layer counts the heads in its input, or turns it by a Hadamard matrix. Not here: who writes these down
(`quantize.integer_activations`), and what the layers then do (`core.activations`).
"""

from collections.abc import Mapping
from typing import Literal

LayerInput = int | Literal["hadamard"]


def is_end(end: str, layer: str) -> bool:
    """Whether a key of `layer_inputs` fits a layer's name: at a dot, or any name where it is empty.

    Args:
        end: the key.
        layer: the name.

    >>> is_end("mlp.down_proj", "layers.0.mlp.down_proj"), is_end("proj", "layers.0.mlp.down_proj")
    (True, False)
    """
    return not end or f".{layer}".endswith(f".{end}")


def input_of(layer: str, inputs: Mapping[str, LayerInput]) -> LayerInput:
    """What a layer does with its inputs: what is said for the longest end of its name; 1: nothing.

    Args:
        layer: its name.
        inputs: by ends of names.
    """
    ends = [end for end in inputs if is_end(end, layer)]
    return inputs[max(ends, key=len)] if ends else 1
