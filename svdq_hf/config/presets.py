"""Presets: named sets of choices, for the class methods of SVDQConfig and for `--preset`."""

from typing import Any, NamedTuple

from svdq_hf.config.choices import VERSION_1


class Preset(NamedTuple):
    """Choices that belong together, and a line of help."""

    changes: dict[str, Any]
    help: str
    needs_data: bool = False
    """Whether it needs calibration batches."""
    rotates: bool = False
    """Whether the model is rotated, which not every family allows, and which is not done while loading."""


PRESETS = {
    "best": Preset(
        {"k": 0.0018, "saliency": "relative"}, "the least loss without data at about 4.5 bits per weight"
    ),
    "small": Preset(
        {"k": 0.0009, "saliency": "relative", "group_size": 64},
        "the least loss without data at about 4.28 bits per weight",
    ),
    "calibrated": Preset(
        {"k": 0.0005, "saliency": "awq", "group_size": 64, "error_feedback": True},
        "for those who have data, at 4.21 to 4.24 bits per weight",
        needs_data=True,
    ),
    "resq": Preset(
        {"activations": 4, "subspace": 0.125, "k": 0, "column_scale": False},
        "activations in 4 bits too, rotated (Llama, Qwen, Mistral); better with data",
        rotates=True,
    ),
    "paper": Preset(
        {"group_size": "tensor", "scale": "absmax", **VERSION_1},
        "the reading of arXiv 2512.01343: one absmax scale per matrix, to compare with",
    ),
}
