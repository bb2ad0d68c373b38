"""Dense tensors of a quantized model: how many bytes each takes, and which choice would quantize it.

In small models the input embedding is most of what is left. Not here: the quantized layers
(`quantize.footprint`).
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from svdq_hf.nn.integer_linear import SVDQIntegerLinear

_DTYPES = {"F32": "FP32", "float32": "FP32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out|output_projection)\.weight$")
_TABLE = re.compile(r"(^|\.)(embed_tokens|word_embeddings|wte|tok_embeddings|shared|embed_in)\.weight$")
_WITH_HEAD = re.compile(r"ForCausalLM|LMHead|ForMaskedLM|ForConditionalGeneration")


class DenseTensor(NamedTuple):
    """A tensor that is not quantized; `choice` names the config's key that would quantize it, or is empty."""

    name: str
    bytes: int
    dtype: str
    choice: str = ""


def dense_tensors(model: Any, rest: Mapping[str, Tensor]) -> tuple[DenseTensor, ...]:
    """The dense tensors of a model in memory, the largest first.

    Args:
        model: the model.
        rest: its tensors `[...]` that are no parts of quantized layers, by name.
    """
    table, head = (_weight(model, get) for get in ("get_input_embeddings", "get_output_embeddings"))
    choices = {id(table): "lm_head" if table is head else "embeddings", id(head): "lm_head"}
    choices.pop(id(None), None)
    if any(isinstance(module, SVDQIntegerLinear) for module in model.modules()):
        choices = {}  # these have neither
    return _sorted(
        DenseTensor(name, one.nbytes, _dtype(str(one.dtype)), choices.get(id(one), ""))
        for name, one in rest.items()
    )


def stored_dense_tensors(folder: str | Path, rest: Mapping[str, tuple[int, str]]) -> tuple[DenseTensor, ...]:
    """The dense tensors of a folder, the largest first; embedding and head are known by their usual names.

    Args:
        folder: of the model.
        rest: bytes and dtype, as safetensors call it, of the tensors that are no parts of quantized layers.
    """
    apart = any(_HEAD.search(name) for name in rest)
    config = _config(folder)
    table = "embeddings" if apart or not _has_head(config) or _chosen(config, "lm_head") else "lm_head"

    def choice(name: str) -> str:
        if _chosen(config, "activations"):
            return ""  # which have neither
        return "lm_head" if _HEAD.search(name) else table if _TABLE.search(name) else ""

    return _sorted(
        DenseTensor(name, size, _dtype(dtype), choice(name)) for name, (size, dtype) in rest.items()
    )


def _weight(model: Any, get: str) -> Tensor | None:
    """The weight of the module that a method of transformers' models returns; None where there is none."""
    try:
        module = getattr(model, get)()
    except (AttributeError, NotImplementedError):
        return None
    weight = getattr(module, "weight", None) if isinstance(module, nn.Module) else None
    return weight if isinstance(weight, Tensor) else None


def _config(folder: str | Path) -> dict[str, Any]:
    """What config.json says; nothing where it cannot be read."""
    try:
        found = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _has_head(config: Mapping[str, Any]) -> bool:
    """Whether config.json names a class with an output head, which without a tensor of its own is tied."""
    named = config.get("architectures")
    return isinstance(named, list) and bool(named) and _WITH_HEAD.search(str(named[0])) is not None


def _chosen(config: Mapping[str, Any], choice: str) -> bool:
    """Whether the model was quantized with a choice that is on."""
    stored = config.get("quantization_config")
    return isinstance(stored, dict) and bool(stored.get(choice))


def _dtype(name: str) -> str:
    plain = name.removeprefix("torch.")
    return _DTYPES.get(plain, plain)


def _sorted(found: Iterable[DenseTensor]) -> tuple[DenseTensor, ...]:
    return tuple(sorted(found, key=lambda one: (-one.bytes, one.name)))
