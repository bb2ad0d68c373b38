"""What each choice of SVDQConfig may be, and what a stored config may hold.

Not here: the choices of how a group is rounded, which `grid.Grid` checks itself.
"""

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from svdq_hf.core.release import how_to_install
from svdq_hf.format.parts import FORMAT_VERSION

QUANT_METHOD = "svdq"
SYNTHETIC = "synthetic"
COMPUTE = ("exact", "fast")
COMPUTE_DTYPES = ("float32", "bfloat16", "float16")
STORED_ONLY = ("quant_method", "format_version", "requires")


def is_count(value: object) -> bool:
    """Whether it is an int from 0 on, which True and False are not here."""
    return type(value) is int and value >= 0


def dtype_name(dtype: Any) -> str | None:
    """A dtype as a config writes it, whichever of the two it is.

    >>> dtype_name("float32")
    'float32'
    """
    return None if dtype is None else str(dtype).removeprefix("torch.")


def _is_share(value: object) -> bool:
    return isinstance(value, float) and 0 < value < 1


def _is_flag(value: object) -> bool:
    return type(value) is bool


def _is_amount(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


def _are_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


_DTYPES = (None, *COMPUTE_DTYPES)
_FLAG = (_is_flag, "true or false")
_ALLOWED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "k": (lambda k: is_count(k) or _is_share(k), "an int from 0 on, or a float between 0 and 1"),
    "rank": (lambda rank: is_count(rank) and rank > 0, "an int from 1 on"),
    "seed": (lambda seed: is_count(seed) and seed < 2**63, "an int from 0 to 2**63 - 1"),
    "error_feedback": (lambda on: _is_flag(on) or on == SYNTHETIC, "true, false or 'synthetic'"),
    "lm_head": _FLAG,
    "embeddings": _FLAG,
    "target_bits": (lambda bits: bits is None or _is_amount(bits), "None or a number of bits above 0"),
    "layer_k": (lambda of: of is None or isinstance(of, dict), "None or k by the layer's name"),
    "saliency": (lambda name: isinstance(name, str), "the name of a score"),
    "modules_to_not_convert": (lambda of: of is None or _are_names(of), "None or a list of names"),
    "damping": (lambda share: share is None or share == 0 or _is_amount(share), "None or a number from 0 on"),
    "compute": (lambda compute: compute in COMPUTE, f"one of {COMPUTE}"),
    "compute_dtype": (
        lambda of: dtype_name(of) in (None, *COMPUTE_DTYPES),
        f"None or one of {COMPUTE_DTYPES}",
    ),
}


def check_choices(choices: Mapping[str, Any]) -> None:
    """Refuse a choice of a wrong type or value, by name.

    Raises:
        ValueError: it names the choice, its value and what is allowed.
    """
    for name, (fits, allowed) in _ALLOWED.items():
        require(fits(choices[name]), name, choices[name], allowed)
    for layer, k in (choices["layer_k"] or {}).items():
        fits_layer = isinstance(layer, str) and is_count(k) and k < 2**63
        require(fits_layer, "layer_k", {layer: k}, "the layer's name and an int from 0 on")


def check_together(choices: Mapping[str, Any], score_needs: Sequence[str]) -> None:
    """Refuse choices that exclude one another; `score_needs`: what the score needs of data."""
    score = f"False with saliency={choices['saliency']!r}"
    head, table, free = choices["lm_head"], choices["embeddings"], not score_needs
    require(free or not head, "lm_head", head, f"{score}: of the head's inputs no data is collected")
    require(free or not table, "embeddings", table, f"{score}: an embedding has no inputs to weigh")
    size = choices["group_size"]
    grouped = isinstance(size, int) or not choices["error_feedback"]
    require(grouped, "group_size", size, "a number of columns where error_feedback is on")


def check_stored(stored: Mapping[str, Any], known: Sequence[str]) -> None:
    """Refuse a format this release cannot read, and keys that are neither stored nor `known` choices."""
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
            close = difflib.get_close_matches(key.lower(), known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"{key}={value!r}: SVDQConfig knows no such key, only {known}{hint}")


def require(holds: bool, key: str, value: object, allowed: str) -> None:
    """Raise the error of a choice unless it holds.

    >>> require(False, "k", -1, "an int from 0 on")
    Traceback (most recent call last):
    ValueError: k=-1: must be an int from 0 on
    """
    if not holds:
        raise ValueError(f"{key}={value!r}: must be {allowed}")
