"""Model card: what the README.md of a quantized model says, to readers of the Hub and to its search.

All of it is read from the folder (the headers of its files, its config.json) and from the base model's
own card; nothing is guessed. Not here: merging it into an existing README.md (`hub.readme`), sending it
(`hub.push`).
"""

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, Unpack

import transformers
from huggingface_hub import EvalResult
from huggingface_hub.repocard_data import eval_results_to_model_index
from transformers.models.auto import modeling_auto

from svdq_hf.config import SVDQConfig
from svdq_hf.core.arguments import checked_arguments
from svdq_hf.core.release import VERSION, install_command
from svdq_hf.format.metadata import tags
from svdq_hf.hub.card_facts import fact_rows
from svdq_hf.hub.markdown import code, plain, table
from svdq_hf.hub.measured import measured_lines
from svdq_hf.hub.readme import README, RESULTS, base_metadata, merge, read_text
from svdq_hf.quantize.footprint import Footprint

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
{install}  # in a checkout of svdq_hf {version} or newer; or install a wheel that is built there
```

```python
import svdq_hf  # registers "svdq" with transformers
from transformers import {auto}

model = {auto}.from_pretrained("{name}"){note}
```
"""

logger = logging.getLogger(__name__)


class CardResult(NamedTuple):
    """One evaluation: `CardResult("text-classification", "glue/sst2", "accuracy", 0.9)`."""

    task: str
    dataset: str
    metric: str
    value: float


class Described(TypedDict, total=False):
    """What is known of a model beside its folder.

    Attributes:
        base_model: the base model's name on the Hub; None: the one that `base_card` states, if any.
        base_card: text of the base model's own card; license, language and the like come from there.
        results: evaluations of the quantized model: a table, and `model-index` in the metadata.
        repo_id: where the model will be on the Hub; None: not known yet.
        footprint: of the folder, where it was read already.
        dense: its linear layers that stayed dense, as `dense_layers` returns them; None: not known.
    """

    base_model: str | None
    base_card: str
    results: Sequence[CardResult]
    repo_id: str | None
    footprint: Footprint
    dense: Sequence[str] | None


@checked_arguments(folder="of a quantized model that is saved")
def write_card(folder: str | Path, **known: Unpack[Described]) -> None:
    """Write the card of a quantized model into the README.md of its folder; other text there is kept.

    Args:
        folder: of the quantized model.
        **known: see `Described`.

    Raises:
        TypeError: an argument is of a wrong type (`WrongKind`, which is a ValueError as well).
        ValueError: see `model_card`; README.md is unchanged then.
    """
    file = Path(folder) / README
    file.write_bytes(model_card(folder, existing=read_text(file), **known).encode())


def model_card(folder: str | Path, *, existing: str = "", **known: Unpack[Described]) -> str:
    """The text of a quantized model's card.

    Args:
        folder: of the quantized model.
        existing: text of an existing README.md, which is kept (`readme.merge`).
        **known: see `Described`.

    Raises:
        ValueError: the folder holds no quantized model, a result is not a finite number, or
            `existing` cannot be merged.
    """
    base_model, repo_id = known.get("base_model"), known.get("repo_id")
    base_card, results = known.get("base_card", ""), known.get("results", ())
    config = _config(folder)
    named = config.get("architectures")
    architecture = str(named[0]) if isinstance(named, list) and named else "model"
    bits = SVDQConfig.from_dict(config["quantization_config"]).bits
    metadata = {"library_name": "transformers", **base_metadata(base_card, base_model), "tags": tags(bits)}
    if results:
        name = (repo_id or f"{base_model or architecture}-svdq").split("/")[-1]
        metadata[RESULTS] = eval_results_to_model_index(name, [_checked(result) for result in results])
    facts = fact_rows(folder, config, known)
    if "base_model" in metadata:
        facts = {"base model": code(metadata["base_model"]), **facts}
    loading = _LOADING.format(
        bits=bits,
        install=install_command(),
        version=VERSION,
        auto=auto_class(architecture),
        name=repo_id or "user/model",
        note="" if repo_id else "  # the name of this repository, or a folder",
    )
    section = [loading, *table(("", ""), facts.items())]
    measured = measured_lines(folder)
    section += ["", *measured] if measured else []
    if results:
        rows = [(plain(one.task), plain(one.dataset), plain(one.metric), f"{one.value:g}") for one in results]
        section += ["", "## Evaluation", "", *table(CardResult._fields, rows)]
    return merge(existing, metadata, "\n".join(section))


def auto_class(architecture: str) -> str:
    """The Auto class that loads an architecture of transformers; without one, the architecture itself.

    Args:
        architecture: name of a model class.

    >>> auto_class("BertForMaskedLM")
    'AutoModelForMaskedLM'
    """
    for auto, mappings in _AUTO_CLASSES.items():
        for names in getattr(modeling_auto, mappings).values():
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
