"""Kinds of models, found by their class: a class's kind is the list of transformers that it stands in.

So no family has to be known. Not here: what a model of each kind is measured on
(`evaluation.comparison.measures`).
"""

from pathlib import Path
from typing import Any

from transformers.models.auto import modeling_auto

KINDS = {
    "speech": ("SPEECH_SEQ_2_SEQ",),
    "frames": ("CTC",),
    "labels": ("SEQUENCE_CLASSIFICATION",),
    "token labels": ("TOKEN_CLASSIFICATION",),
    "halves": ("SEQ_TO_SEQ_CAUSAL_LM",),
    "causal": ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT"),
    "masked": ("MASKED_LM",),
}
"""Transformers' names of lists of classes, by our kinds; BART stands in several, and the first one counts."""
EMBEDDINGS = "embeddings"
OF_SPEECH = ("speech", "frames")


def kind_of(model: Any, where: str | Path) -> str:
    """The kind of a model.

    Args:
        model: on any device.
        where: its folder or name, for the error.

    Raises:
        ValueError: it is of no kind that can be compared.
    """
    name = type(model).__name__
    for kind, lists in KINDS.items():
        if any(name in _classes(one) for one in lists):
            return kind
    if name in _classes("", "MODEL_MAPPING_NAMES") and model.main_input_name == "input_ids":
        return EMBEDDINGS
    raise ValueError(
        f"{where}: a {name} reads or answers what svdq compare has no measure for (it knows models that "
        "write, fill masks, label or embed texts, and speech models); compare its outputs in Python"
    )


def _classes(task: str, names: str = "") -> set[str]:
    found = getattr(modeling_auto, names or f"MODEL_FOR_{task}_MAPPING_NAMES").values()
    return {name for one in found for name in ((one,) if isinstance(one, str) else one)}
