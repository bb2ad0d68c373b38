"""Model card: what the README.md of a quantized model says, to readers of the Hub and to its search.

All of it is read from the folder (the headers of its files, its config.json) and from the base model's
own card; nothing is guessed. Not here: merging it into an existing README.md (`hub.readme`), sending it
(`hub.push`).
"""

import json
import logging
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, Unpack

from huggingface_hub import EvalResult
from huggingface_hub.repocard_data import eval_results_to_model_index

from svdq_hf.config import SVDQConfig
from svdq_hf.core.arguments import checked_arguments
from svdq_hf.core.release import VERSION, install_command
from svdq_hf.format.metadata import tags
from svdq_hf.hub.card_facts import fact_rows
from svdq_hf.hub.markdown import code, plain, table
from svdq_hf.hub.measured import measured_lines
from svdq_hf.hub.readme import README, RESULTS, base_metadata, merge, metadata_of, read_text
from svdq_hf.hub.usage import usage
from svdq_hf.quantize.footprint import Footprint

_LOADING = """\
## {bits}-bit weights, by svdq_hf

{what}

```sh
{install}  # in a checkout of svdq_hf {version} or newer; or install a wheel that is built there
```

```python
{usage}
```
"""

_WEIGHTS = """\
The most salient weights of each linear layer are in FP32, the rest in {bits} bits
(after [arXiv 2512.01343](https://arxiv.org/abs/2512.01343))."""

_ACTIVATIONS = """\
The model is rotated, weights of its linear layers are rounded to {bits} bits and their inputs to
{activations} (after [arXiv 2412.14363](https://arxiv.org/abs/2412.14363))."""

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
        bytes_before: of the dense model's files; where it is absent the folder's report is looked at.
    """

    base_model: str | None
    base_card: str
    results: Sequence[CardResult]
    repo_id: str | None
    footprint: Footprint
    dense: Sequence[str] | None
    bytes_before: int


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
    base_model, repo_id = checked_name(known.get("base_model")), known.get("repo_id")
    stated = metadata_of(existing).get("base_model", base_model) if base_model else None
    if base_model and stated != base_model:
        raise ValueError(f"{README} has base_model: {stated}, not {base_model}; change it there")
    base_card, results = known.get("base_card", ""), known.get("results", ())
    config = _config(folder)
    named = config.get("architectures")
    architecture = str(named[0]) if isinstance(named, list) and named else "model"
    choices = SVDQConfig.from_dict(config["quantization_config"])
    bits, told = choices.bits, _WEIGHTS if choices.activations is None else _ACTIVATIONS
    metadata = {"library_name": "transformers", **base_metadata(base_card, base_model), "tags": tags(bits)}
    if results:
        name = (repo_id or f"{base_model or architecture}-svdq").split("/")[-1]
        metadata[RESULTS] = eval_results_to_model_index(name, [_checked(result) for result in results])
    facts = fact_rows(folder, config, known)
    if "base_model" in metadata:
        facts = {"base model": code(metadata["base_model"]), **facts}
    loading = _LOADING.format(
        bits=bits,
        what=told.format(bits=bits, activations=choices.activations),
        install=install_command(),
        version=VERSION,
        usage=usage(folder, architecture, repo_id),
    )
    section = [loading, *table(("", ""), facts.items())]
    measured = measured_lines(folder)
    section += ["", *measured] if measured else []
    if results:
        rows = [(plain(one.task), plain(one.dataset), plain(one.metric), f"{one.value:g}") for one in results]
        section += ["", "## Evaluation", "", *table(CardResult._fields, rows)]
    return merge(existing, metadata, "\n".join(section))


def checked_name(base_model: str | None) -> str | None:
    """A base model's name, refused where it is none that the Hub could have.

    Raises:
        ValueError: it is a folder, or no user/model.
    """
    if base_model is not None and (base_model.count("/") > 1 or not _NAME.fullmatch(base_model)):
        raise ValueError(
            f"base_model={base_model!r}: must be a name on the Hub, user/model; a folder's name says nothing "
            "to readers of the card"
        )
    return base_model


_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


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
