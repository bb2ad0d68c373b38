"""A README.md that two hands write: its author's text and metadata, and one section of ours.

Our section stands between two comments. What else is in the file is its author's and is kept as it is,
byte for byte but for `model-index`. Not here: what our section says (`card`).
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.repocard_data import model_index_to_eval_results

README = "README.md"
BEGIN = "<!-- svdq_hf: begin (generated; write your own text outside of these two comments) -->"
END = "<!-- svdq_hf: end -->"
RESULTS = "model-index"
COPIED = ("license", "license_name", "license_link", "pipeline_tag", "language")
"""Metadata that a quantized model has from its base."""

logger = logging.getLogger(__name__)


def merge(text: str, metadata: Mapping[str, Any], section: str) -> str:
    """`text`, a README.md, with the metadata keys that it lacks, and with our section.

    section: what goes between our two comments: in place of what is there, or at the end.

    A key that is there keeps its value; in `model-index` a result of the same task, dataset and
    metric gets the new value, the others stay.

    Raises:
        ValueError: the metadata are no YAML mapping, or only one of our comments is there.

    >>> print(merge("# Mine", {"license": "mit"}, "ours").replace(BEGIN, "<").replace(END, ">"), end="")
    ---
    license: mit
    ---
    <BLANKLINE>
    # Mine
    <BLANKLINE>
    <
    ours
    >
    """
    newline = "\r\n" if "\r\n" in text else "\n"
    ours = newline.join([BEGIN, *section.splitlines(), END])
    head, body = _split(_with_metadata(text, metadata, newline))
    counts = body.count(BEGIN), body.count(END)
    if counts == (1, 1) and body.index(BEGIN) < body.index(END):
        return head + body[: body.index(BEGIN)] + ours + body[body.index(END) + len(END) :]
    if counts != (0, 0):
        raise ValueError(
            f"{README}: of the two comments around the generated part ({BEGIN!r}, {END!r}) there are "
            f"{counts[0]} and {counts[1]}; restore the pair, or remove what is left of it"
        )
    gap = newline if body.endswith("\n") or not body else 2 * newline
    return f"{head}{body}{gap}{ours}{newline}"


def read_text(file: Path, errors: str = "strict") -> str:
    """The text of a README.md with its line ends as they are; empty where there is no such file.

    errors: "replace" reads what is not UTF-8, too.

    Raises:
        ValueError: it is not UTF-8.
    """
    try:
        return file.read_bytes().decode(errors=errors) if file.is_file() else ""
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 text ({error}); convert or remove it") from error


def metadata_of(text: str) -> dict[str, Any]:
    """The metadata at the head of a README.md; empty where there are none.

    Raises:
        ValueError: they are no YAML mapping.
    """
    match = REGEX_YAML_BLOCK.search(text)
    try:
        found = yaml.safe_load(match[2]) if match else None
        if not isinstance(found, dict | None):
            raise ValueError(f"a {type(found).__name__}, not lines of `key: value`")
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{README}: the metadata between its --- lines cannot be read ({reason}); repair or remove them"
        ) from error
    return found or {}


def base_metadata(card: str, base_model: str | None) -> dict[str, Any]:
    """What the card of a base model says of its quantized copy: `COPIED`, and whose copy it is.

    Without `base_model`, a name on the Hub, the base is a folder: the copy then stands to the models of
    the Hub as that folder's card says of itself (a fine-tune of X is one after quantizing, too).
    A card that cannot be read is left out with a warning.
    """
    try:
        stated = metadata_of(card)
    except ValueError as error:
        logger.warning("the base model's card is left out: %s", error)
        stated = {}
    keys = COPIED if base_model else ("base_model", "base_model_relation", *COPIED)
    copied = {key: stated[key] for key in keys if _is_text(stated.get(key))}
    if not str(copied.get("license_link", "")).startswith("https://"):
        copied.pop("license_link", None)  # a file that only the base's repository has
    named = {"base_model": base_model, "base_model_relation": "quantized"} if base_model else {}
    return {**named, **copied}


def section_of(text: str) -> str:
    """What stands between our two comments; empty where they are not there."""
    body = _split(text)[1]
    begin, end = body.find(BEGIN), body.find(END)
    return body[begin + len(BEGIN) : end].strip() if 0 <= begin < end else ""


def own_text(text: str) -> str:
    """What stands outside of the metadata and of our section."""
    body = _split(text)[1]
    begin, end = body.find(BEGIN), body.find(END)
    return (body[:begin] + body[end + len(END) :] if 0 <= begin < end else body).strip()


def _is_text(value: object) -> bool:
    items = value if isinstance(value, list) else [value]
    return bool(items) and all(isinstance(item, str) and item.strip() for item in items)


def _split(text: str) -> tuple[str, str]:
    """The metadata with their --- lines, and the rest."""
    match = REGEX_YAML_BLOCK.search(text)
    at = match.end() if match else 0
    return text[:at], text[at:]


def _with_metadata(text: str, metadata: Mapping[str, Any], newline: str) -> str:
    """`text` with the keys that it lacks after those that it has, whose lines stay as they are."""
    old = metadata_of(text)
    if RESULTS in metadata and RESULTS in old:
        text = _with_results(text, metadata[RESULTS])
    missing = {key: value for key, value in metadata.items() if key not in old}
    if not missing:
        return text
    added = ModelCardData(**missing).to_yaml(line_break=newline)
    match = REGEX_YAML_BLOCK.search(text)
    if match is None:
        return f"---{newline}{added}{newline}---{newline}{newline if text else ''}{text}"
    result = text[: match.end(2)] + newline + added + text[match.end(2) :]
    if metadata_of(result).keys() != old.keys() | missing.keys():
        raise ValueError(
            f"{README}: nothing can be added to its metadata; write them as lines of `key: value`"
        )
    return result


def _with_results(text: str, model_index: list[dict[str, Any]]) -> str:
    """`text` with these results in its `model-index`; its metadata are written anew for that."""
    try:
        card = ModelCard(text)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{README}: its {RESULTS} cannot be read ({error}); repair or remove it") from error
    _, new = model_index_to_eval_results(model_index)
    data: Any = card.data
    kept = [one for one in data.eval_results or [] if not any(one.is_equal_except_value(two) for two in new)]
    data.eval_results = kept + new
    return str(card)
