"""The model card: what the README.md of a quantized model says, to readers of the Hub and to its search.

All of it is read from the folder (the headers of its files, its config.json) and from the base model's
own card; nothing is guessed. Not here: what becomes of a README.md that is there (`readme`), sending it
anywhere (`hub`).
"""

import json
import logging
import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from huggingface_hub import EvalResult
from huggingface_hub.repocard_data import eval_results_to_model_index
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.pytorch_utils import Conv1D

from svdq_hf.config import SVDQConfig
from svdq_hf.experts import stacks_of
from svdq_hf.footprint import Footprint, read_footprint
from svdq_hf.names import Stored
from svdq_hf.opening import open_tensors, weight_files
from svdq_hf.readme import README, RESULTS, base_metadata, merge, read_text
from svdq_hf.saliency import saliency_names, score_needs
from svdq_hf.selection import layers_to_convert, weights_of

_AUTO_CLASSES = {
    "AutoModel": "MODEL_MAPPING_NAMES",
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForMaskedLM": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "AutoModelForSeq2SeqLM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForSequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForTokenClassification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForQuestionAnswering": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
    "AutoModelForImageClassification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForSpeechSeq2Seq": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "AutoModelForImageTextToText": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
}

_LOADING = """\
## {bits}-bit weights, by svdq_hf

The most salient weights of each linear layer are in FP32, the rest in {bits} bits
(after [arXiv 2512.01343](https://arxiv.org/abs/2512.01343)).

```sh
pip install svdq_hf
```

```python
import svdq_hf  # registers "svdq" with transformers
from transformers import {auto}

model = {auto}.from_pretrained("{name}"){note}
```
"""

logger = logging.getLogger(__name__)


def tags(bits: int = 4) -> list[str]:
    """What the Hub files a model of so many bits under.

    >>> tags(8)
    ['svdq', '8-bit', 'quantized', 'mixed-precision']
    """
    return ["svdq", f"{bits}-bit", "quantized", "mixed-precision"]


class CardResult(NamedTuple):
    """One evaluation: `CardResult("text-classification", "glue/sst2", "accuracy", 0.9)`."""

    task: str
    dataset: str
    metric: str
    value: float


def write_card(folder: str | Path, **choices: Any) -> None:
    """Write the card of the quantized model in `folder` into its README.md, or into what is there.

    choices: those of `model_card`, but for `existing`.

    Raises:
        ValueError: see `model_card`; README.md is as before then.
    """
    file = Path(folder) / README
    file.write_bytes(model_card(folder, existing=read_text(file), **choices).encode())


def model_card(
    folder: str | Path,
    *,
    base_model: str | None = None,
    base_card: str = "",
    results: Sequence[CardResult] = (),
    repo_id: str | None = None,
    existing: str = "",
) -> str:
    """The text of the card of the quantized model in `folder`.

    base_model: the base model's name on the Hub; None: what `base_card` says, if it does.
    base_card: text of the base model's own card; license, language and the like come from there.
    results: evaluations of the quantized model: a table, and `model-index` in the metadata.
    repo_id: where the model will be on the Hub; None: not known yet.
    existing: text of the README.md that is there, which is kept (`readme.merge`).

    Raises:
        ValueError: the folder holds no quantized model, a result is not a finite number, or
            `existing` cannot be merged.
    """
    config = _config(folder)
    named = config.get("architectures")
    architecture = str(named[0]) if isinstance(named, list) and named else "model"
    bits = SVDQConfig.from_dict(config["quantization_config"]).bits
    metadata = {"library_name": "transformers", **base_metadata(base_card, base_model), "tags": tags(bits)}
    if results:
        name = (repo_id or f"{base_model or architecture}-svdq").split("/")[-1]
        metadata[RESULTS] = eval_results_to_model_index(name, [_checked(result) for result in results])
    facts = _facts(folder, config)
    if "base_model" in metadata:
        facts = {"base model": _code(metadata["base_model"]), **facts}
    loading = _LOADING.format(
        bits=bits,
        auto=auto_class(architecture),
        name=repo_id or "user/model",
        note="" if repo_id else "  # the name of this repository, or a folder",
    )
    section = [loading, *_table(("", ""), facts.items())]
    if results:
        rows = [
            (_plain(one.task), _plain(one.dataset), _plain(one.metric), f"{one.value:g}") for one in results
        ]
        section += ["", "## Evaluation", "", *_table(CardResult._fields, rows)]
    return merge(existing, metadata, "\n".join(section))


def auto_class(architecture: str) -> str:
    """The Auto class that loads an architecture of transformers; where there is none, its own class.

    >>> auto_class("BertForMaskedLM")
    'AutoModelForMaskedLM'
    """
    for auto, table in _AUTO_CLASSES.items():
        for names in getattr(modeling_auto, table).values():
            if architecture in ((names,) if isinstance(names, str) else names):
                return auto
    return architecture if hasattr(transformers, architecture) else "AutoModel"


def _config(folder: str | Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads((Path(folder) / "config.json").read_text())
        if not isinstance(config["quantization_config"], dict):
            raise TypeError("quantization_config is no mapping")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}: its config.json is not that of a quantized model: {error!r}") from error
    return config


def _checked(one: CardResult) -> EvalResult:
    if not math.isfinite(one.value):
        raise ValueError(f"{one}: the value must be a finite number")
    return EvalResult(one.task, one.dataset, one.dataset, one.metric, one.value)


def _facts(folder: str | Path, config: dict[str, Any]) -> dict[str, str]:
    """The rows of the card's table."""
    weights, choices = read_footprint(folder), SVDQConfig.from_dict(config["quantization_config"])
    rows = {
        "layers quantized": f"{len(weights.layers)}, of {weights.weights:,} weights",
        "k, weights in FP32": f"{_k(choices, weights)}, {weights.salient_share:.3%} of all",
        "score": _score(choices),
        "scales": _scales(choices),
        "levels": choices.levels,
        "data": _data(choices),
        "bits per weight": f"{weights.bits_per_weight:.2f} in these layers, everything counted",
        "parameters": f"{_parameters(folder, weights):,} (the Hub counts packed bytes)",
    }
    errors = {layer.name: layer.facts.get("relative_error") for layer in weights.layers}
    known = {name: error for name, error in errors.items() if error is not None}
    if known:
        worst = max(known, key=known.__getitem__)
        mean = sum(known.values()) / len(known)
        rows["relative error"] = f"mean {mean:.4f}, worst {known[worst]:.4f} ({_code(worst)})"
    dense = _dense_layers(folder, weights, choices)
    if dense is not None:
        rows["linear layers kept dense"] = ", ".join(dense) or "none"
    return rows


def _score(choices: SVDQConfig) -> str:
    """The score's name, and its rank where it has one; of a score that is not registered here, the name."""
    known = choices.saliency in saliency_names()
    ranked = known and "rank" in score_needs(choices.saliency)
    return f"{_code(choices.saliency)}{f', rank {choices.rank}' if ranked else ''}"


def _k(choices: SVDQConfig, weights: Footprint) -> str:
    """How many salient weights a layer has; of several numbers the range."""
    if choices.layer_k is None:
        return f"{choices.k} per layer"
    ks = [layer.k for layer in weights.layers]
    budget = "" if choices.target_bits is None else f", of {choices.target_bits} bits per weight"
    return f"{min(ks)} to {max(ks)} per layer{budget}"


def _data(choices: SVDQConfig) -> str:
    """What was needed beside the weights."""
    batches = "none, but synthetic batches" if choices.synthetic else "batches"
    return f"{batches}, for {', '.join(choices.data_needs)}" if choices.data_needs else "none"


def _scales(choices: SVDQConfig) -> str:
    """How the scales are laid out and fitted, in a few words."""
    grid = choices.scheme.grid
    group = f"{grid.group_size} columns" if isinstance(grid.group_size, int) else grid.group_size
    bits = ", in 8 bits" if grid.row_scale else ""
    columns = "; one per column" if grid.column_scale else ""
    return f"one per {group}{bits}, {grid.scale}{columns}"


def _parameters(folder: str | Path, weights: Footprint) -> int:
    """Numbers that the model has, a quantized weight counted as one."""
    packed = {key for layer in weights.layers for key in Stored(layer.name, layer.shape).all_keys()}
    count = weights.weights
    for file in weight_files(folder):
        with open_tensors(file) as opened:
            names = set(opened.keys()) - packed
            count += sum(math.prod(opened.get_slice(name).get_shape()) for name in names)
    return count


def _dense_layers(folder: str | Path, weights: Footprint, choices: SVDQConfig) -> list[str] | None:
    """Linear layers that were not quantized, of a model built without weights; None: not to be had.

    Layers that differ by a number only share a place: `layers.*.gate` x 12.
    """
    try:
        model = _empty_model(folder)
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
    return [f"{_code(name)} x {count}" if count > 1 else _code(name) for name, count in shared.items()]


def _empty_model(folder: str | Path) -> nn.Module:
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    name = (config.architectures or ["none"])[0]
    model_class = getattr(transformers, name, None)
    if not (isinstance(model_class, type) and issubclass(model_class, PreTrainedModel)):
        raise ValueError(f"transformers has no model {name!r}")
    with torch.device("meta"):
        return model_class(config)  # type: ignore[no-any-return]


def _table(head: Sequence[str], rows: Any) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def _plain(text: str) -> str:
    """Text that cannot end a table's cell or a comment: names come from files of strangers."""
    return re.sub(r"[^\w .,:;/@+*()=%-]", "?", str(text))[:200]


def _code(text: str | list[str]) -> str:
    return ", ".join(f"`{_plain(one)}`" for one in ([text] if isinstance(text, str) else text))
