"""Facts for a model card's table: what was quantized, how, with which result.

Not here: the card around the table (`hub.card`).
"""

import json
import logging
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoConfig, AutoModel
from transformers.pytorch_utils import Conv1D

from svdq_hf.config import SVDQConfig
from svdq_hf.core.saliency import saliency_names, score_needs
from svdq_hf.format.files import REPORT_FILE
from svdq_hf.hub.markdown import code
from svdq_hf.nn.expert_layouts import stacks_of
from svdq_hf.quantize.empty_model import built, named_class
from svdq_hf.quantize.footprint import Footprint, read_footprint
from svdq_hf.quantize.footprint_text import megabytes
from svdq_hf.quantize.selection import layers_to_convert, weights_of

logger = logging.getLogger(__name__)


def fact_rows(
    folder: str | Path, config: dict[str, Any], known: Mapping[str, Any] | None = None
) -> dict[str, str]:
    """The rows of the card's table.

    Args:
        folder: of the quantized model.
        config: the keys of its config.json.
        known: its "footprint" and the result of `dense_layers` ("dense"), where these are known already.

    Returns:
        Text by title.
    """
    choices = SVDQConfig.from_dict(config["quantization_config"])
    known = known or {}
    weights: Footprint = known["footprint"] if "footprint" in known else read_footprint(folder)
    rows = {
        "size": _sizes(folder, weights, known),
        "layers quantized": f"{len(weights.layers)}, of {weights.weights:,} weights",
        "k, weights in FP32": f"{_k(choices, weights)}, {weights.salient_share:.3%} of all",
        "score": _score(choices, weights),
        "scales": _scales(choices),
        "levels": choices.levels,
        "data": _data(choices),
        **_activations(choices),
        "bits per weight": f"{weights.bits_per_weight:.2f} in these layers, everything counted",
        "parameters": f"{weights.weights + weights.dense_weights:,} (the Hub counts packed bytes)",
    }
    errors = {layer.name: layer.facts.get("relative_error") for layer in weights.layers}
    measured = {name: error for name, error in errors.items() if error is not None}
    if measured:
        worst = max(measured, key=measured.__getitem__)
        mean = sum(measured.values()) / len(measured)
        rows["relative error"] = f"mean {mean:.4f}, worst {measured[worst]:.4f} ({code(worst)})"
    dense = known["dense"] if "dense" in known else dense_layers(None, weights, choices, folder)
    if dense is not None:
        rows["linear layers kept dense"] = ", ".join(map(_row_of, dense)) or "none"
    return rows


def _sizes(folder: str | Path, weights: Footprint, known: Mapping[str, Any]) -> str:
    """Size after, and before where it is known."""
    before = known.get("bytes_before") or _reported(Path(folder) / REPORT_FILE)
    after = megabytes(weights.total_bytes)
    return after if before is None else f"{megabytes(before)} before, {after} now"


def _reported(file: Path) -> int | None:
    """Size of the dense model as the report of `svdq quantize` has it."""
    try:
        size = json.loads(file.read_text(encoding="utf-8"))["bytes_before"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return size if type(size) is int and size > 0 else None


def _score(choices: SVDQConfig, weights: Footprint) -> str:
    """The score's name, and its rank where it has one; the rank of an unregistered score is not known."""
    plain = choices.plain_score
    experts = any(len(layer.shape) == 3 for layer in weights.layers)
    if plain != choices.saliency and (choices.lm_head or choices.embeddings or experts):
        return f"{code(choices.saliency)}; {code(plain)} in head, embedding and experts"
    known = choices.saliency in saliency_names()
    ranked = known and "rank" in score_needs(choices.saliency)
    return f"{code(choices.saliency)}{f', rank {choices.rank}' if ranked else ''}"


def _k(choices: SVDQConfig, weights: Footprint) -> str:
    """How many salient weights a layer has; the range where the layers differ."""
    if choices.layer_k is None:
        return f"{choices.k} per layer"
    ks = [layer.k for layer in weights.layers]
    budget = "" if choices.target_bits is None else f", of {choices.target_bits} bits per weight"
    return f"{min(ks)} to {max(ks)} per layer{budget}"


def _data(choices: SVDQConfig) -> str:
    """The data that quantizing needed."""
    if choices.activations is not None and choices.basis == "data" and not choices.data_needs:
        return "batches, for the axes"
    written = "what the model wrote itself" if choices.follows_loss else "synthetic batches"
    batches = f"none, but {written}" if choices.synthetic else "batches"
    uses = [DATA_TELLS[need] for need in choices.data_needs]
    return f"{batches}, for {' and '.join(uses)}" if uses else "none"


DATA_TELLS = {
    "input_norm": "the sizes of inputs",
    "input_gram": "how inputs vary together (error feedback)",
    "tokens": "their number",
    "sensitivity": "what rounding costs the loss (PQI)",
    "given_back": "what rounding costs the loss (ReQuant)",
}
"""What each need of `saliency.FROM_DATA` is, in the words of a card."""


def _activations(choices: SVDQConfig) -> dict[str, str]:
    """What the inputs of layers are rounded to, where they are."""
    if choices.activations is None:
        return {}
    told = f"{choices.activations} bits a value, a scale for each token"
    if choices.subspace:
        axes = f"{choices.subspace:.1%} of the axes, those that vary most by the {choices.basis or 'data'}"
        told += f"; 8 bits in {axes}"
    return {"activations": told}


def _scales(choices: SVDQConfig) -> str:
    """Layout and rule of the scales, in a few words."""
    grid = choices.scheme.grid
    group = f"{grid.group_size} columns" if isinstance(grid.group_size, int) else grid.group_size
    bits = ", in 8 bits" if grid.row_scale else ""
    columns = "; one per column" if grid.column_scale else ""
    return f"one per {group}{bits}, {grid.scale}{columns}"


def dense_layers(
    model: nn.Module | None, weights: Footprint, choices: SVDQConfig, folder: str | Path
) -> list[str] | None:
    """Linear layers that were not quantized; names that differ by a number are one: `layers.*.gate x 12`.

    Args:
        model: the dense model of the folder, without weights; None: it is built.
        weights: the folder's footprint.
        choices: its config.
        folder: of the quantized model.

    Returns:
        The entries; None where they cannot be found out, and the log says why.
    """
    try:
        model = model if model is not None else _model_without_weights(folder)
        linear = {name for name, one in model.named_modules() if isinstance(one, nn.Linear | Conv1D)}
        linear |= {stored.name for name, one in model.named_modules() for stored in stacks_of(name, one)}
        tables = {name for name, one in model.named_modules() if isinstance(one, nn.Embedding)}
        layers = [layer.name for layer in weights.layers if layer.name not in tables]
        quantized = set(layers)
        if not quantized <= linear:  # the family's files have other names than its modules
            chosen = layers_to_convert(model, choices)
            quantized = {stored.name for name, one in chosen.items() for stored in weights_of(name, one)}
        if len(quantized) != len(layers):
            raise ValueError("its files hold other layers than its config.json says")
    except Exception as error:  # one row of a card is not worth a failure
        logger.warning("%s: the card does not name the dense layers: %s", folder, error)
        return None
    shared = Counter(re.sub(r"\.\d+(?=\.)", ".*", name) for name in sorted(linear - quantized))
    return [f"{name} x {count}" if count > 1 else name for name, count in shared.items()]


def _row_of(layers: str) -> str:
    """The text of a card for one entry of `dense_layers`."""
    name, times, count = layers.partition(" x ")
    return f"{code(name)}{times}{count}"


def _model_without_weights(folder: str | Path) -> nn.Module:
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    kind = named_class(config.architectures)
    if kind is AutoModel:
        raise ValueError(f"transformers has no model {config.architectures!r}")
    model: nn.Module = built(kind, config)
    return model
