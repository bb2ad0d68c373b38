"""Checks of a config: values that a choice cannot have, choices that exclude one another, unknown keys.

Not here: what each single choice may be (`config.choices`).
"""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from svdq_hf.config.choice_row import is_count
from svdq_hf.config.choices import CHOICES, QUANT_METHOD
from svdq_hf.core.grid_values import LEVELS, require
from svdq_hf.core.release import how_to_install
from svdq_hf.format.versions import FORMAT_VERSION

WITH_ACTIVATIONS = {
    "k": 0,
    "column_scale": False,
    "lm_head": False,
    "embeddings": False,
    "target_bits": None,
    "layer_k": None,
}
"""What choices must be where activations are rounded: products of integers have no room for the rest."""

STORED_ONLY = ("quant_method", "format_version", "requires")


def check_choices(choices: Mapping[str, Any]) -> None:
    """Refuse a choice of a wrong type or value.

    Args:
        choices: the value of every row of `CHOICES`, by name.

    Raises:
        ValueError: it names the choice, its value and what is allowed.
    """
    for name, row in CHOICES.items():
        require(row.check.fits(choices[name]), name, choices[name], row.check.allowed)
    for layer, k in (choices["layer_k"] or {}).items():
        fits_layer = isinstance(layer, str) and is_count(k) and k < 2**63
        require(fits_layer, "layer_k", {layer: k}, "the layer's name and an int from 0 on")


def check_together(choices: Mapping[str, Any], score_needs: Sequence[str]) -> None:
    """Refuse choices that exclude one another.

    Args:
        choices: the value of every row of `CHOICES`, each allowed by itself.
        score_needs: what the score needs from data.

    Raises:
        ValueError: it names one of the two, its value and what is allowed beside the other.
    """
    size = choices["group_size"]
    grouped = isinstance(size, int) or not choices["error_feedback"]
    require(grouped, "group_size", size, "a number of columns where error_feedback is on")
    bits, levels = choices["bits"], choices["levels"]
    require(levels in LEVELS[bits], "levels", levels, f"one of {list(LEVELS[bits])} where bits is {bits}")
    _check_activations(choices, score_needs)


def _check_activations(choices: Mapping[str, Any], score_needs: Sequence[str]) -> None:
    """Refuse what layers that round their activations cannot have, and choices that only these have."""
    activations = choices["activations"]
    if activations is None:
        for name in ("subspace", "basis", "layer_inputs"):
            require(not choices[name], name, choices[name], "left out where activations is None")
        return
    beside = f"where activations is {activations} (SVDQConfig.resq(), --preset resq, sets what goes with it)"
    for name, value in WITH_ACTIVATIONS.items():
        require(choices[name] == value, name, choices[name], f"{value!r} {beside}")
    score = choices["saliency"]
    require(not score_needs, "saliency", score, f"one without data {beside}: no salient weights are kept")
    whole = choices["scale_bits"] == 8 or choices["group_size"] == "row"
    require(whole, "scale_bits", choices["scale_bits"], f"8, or group_size 'row', {beside}")


def check_stored(stored: Mapping[str, Any]) -> None:
    """Refuse a format that this release cannot read, and keys that are neither stored nor a choice.

    Args:
        stored: the keys of a config.json that are no choices.

    Raises:
        ValueError: it names the key, its value and the remedy, or the key that was probably meant.
    """
    version = stored.get("format_version", FORMAT_VERSION)
    require(type(version) is int and version >= 1, "format_version", version, "an int from 1 on")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"format_version={version}: this release of svdq_hf reads up to {FORMAT_VERSION}; "
            f"install a newer one: {how_to_install()}"
        )
    method = stored.get("quant_method", QUANT_METHOD)
    require(method == QUANT_METHOD, "quant_method", method, repr(QUANT_METHOD))
    for key, value in stored.items():
        if key not in STORED_ONLY:
            known, meant = list(CHOICES), _meant(key)
            hint = f"; did you mean {meant!r}?" if meant else ""
            hint = "; presets are methods, such as SVDQConfig.best()" if key == "preset" else hint
            raise ValueError(f"{key}={value!r}: SVDQConfig knows no such key, only {known}{hint}")


ELSEWHERE = {
    "skip": "modules_to_not_convert",
    "skip_modules": "modules_to_not_convert",
    "exclude": "modules_to_not_convert",
    "ignore": "modules_to_not_convert",
    "ignored_layers": "modules_to_not_convert",
    "llm_int8_skip_modules": "modules_to_not_convert",
    "load_in_4bit": "bits",
    "load_in_8bit": "bits",
    "wbits": "bits",
    "w_bit": "bits",
    "nbits": "bits",
    "weight_bits": "bits",
    "block_size": "group_size",
    "q_group_size": "group_size",
    "dtype": "compute_dtype",
    "torch_dtype": "compute_dtype",
    "bnb_4bit_compute_dtype": "compute_dtype",
    "damp_percent": "damping",
    "quantize_lm_head": "lm_head",
    "method": "saliency",
    "score": "saliency",
    "top_k": "k",
}
"""What a choice is called by other methods (bitsandbytes, GPTQ, AWQ, HQQ, compressed-tensors), or on the
command line."""


def _meant(key: str) -> str | None:
    """The choice that was probably meant by an unknown key.

    >>> _meant("skip"), _meant("groupsize"), _meant("zzz")
    ('modules_to_not_convert', 'group_size', None)
    """
    close = difflib.get_close_matches(key.lower(), [*CHOICES, *ELSEWHERE], n=1)
    return ELSEWHERE.get(close[0], close[0]) if close else None
