"""Variants of one model that are timed side by side: quantized, dense in two dtypes, by other methods.

Imports neither torch nor transformers. Not here: loading them (`evaluation.speed.worker`).
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from svdq_hf.config.choices import CHOICES
from svdq_hf.core.grid_values import require
from svdq_hf.evaluation.speed.peers import PEERS

DENSE: Final = {"fp32": ("dense FP32", "float32", 4), "bf16": ("dense bfloat16", "bfloat16", 2)}
"""The dense variants by the word for `only`: name, dtype, bytes of a weight."""
SVDQ: Final = "svdq"
WORDS: Final = (SVDQ, *DENSE, *PEERS)
NEEDS_DENSE: Final = "needs the dense model: give --dense FOLDER"


@dataclass(frozen=True)
class Variant:
    """A way to load a model.

    Attributes:
        word: for `only`.
        name: for users.
        load: arguments of `Worker.load`.
        weight_bytes: bytes that a weight needs in memory at least.
        missing: why it cannot be measured; None: it can be tried.
    """

    word: str
    name: str
    load: dict[str, Any] = field(default_factory=dict)
    weight_bytes: float = 0.0
    missing: str | None = None

    @property
    def loads_as_users_do(self) -> bool:
        """Whether the time and memory of loading are those of a user's own loading."""
        return not self.load.get("dequantize", False)

    @property
    def maps_dense(self) -> bool:
        """Whether pages of the dense model's file count as its memory: it is quantized while it loads."""
        return "quantize" in self.load or "peer" in self.load


def variants(
    folder: Path, method: str | None, dense: Path | None, config: Any, only: tuple[str, ...] = ()
) -> list[Variant]:
    """The variants of a folder's model.

    Args:
        folder: of the model.
        method: by which it is quantized; None: it is dense.
        dense: a folder of the same model, dense; None: made of the quantized one, where that is svdq's.
        config: an SVDQConfig by which a dense model is quantized on the way.
        only: words of those that are wanted; empty: all.

    Returns:
        The folder's own model first.

    Raises:
        ValueError: an unknown word in `only`.
    """
    for word in only:
        require(word in WORDS, "only", word, f"one of {WORDS}")
    known = folder if method is None else dense
    found = [_own(folder, method, config), *_dense(folder, known, method), *_peers(known)]
    return [one for one in found if not only or one.word in only]


def _own(folder: Path, method: str | None, config: Any) -> Variant:
    if method is None:
        choices = {name: getattr(config, name) for name in CHOICES}
        return Variant(SVDQ, "svdq, while loading", {"folder": str(folder), "quantize": choices})
    name = SVDQ if method == SVDQ else f"{method}, as saved"
    return Variant(SVDQ, name, {"folder": str(folder)})


def _dense(folder: Path, known: Path | None, method: str | None) -> list[Variant]:
    found = []
    for word, (name, dtype, size) in DENSE.items():
        load: dict[str, Any] = {"folder": str(known or folder), "dtype": dtype}
        if known is None:
            load["dequantize"] = True
        missing = None if known is not None or method == SVDQ else NEEDS_DENSE
        found.append(Variant(word, name, load, size, missing))
    return found


def _peers(known: Path | None) -> list[Variant]:
    found = []
    for word, peer in PEERS.items():
        missing = peer.missing or (NEEDS_DENSE if known is None else None)
        load = {"folder": str(known), "peer": word, "dtype": "bfloat16"}
        found.append(Variant(word, peer.name, load, 0.5, missing))
    return found
