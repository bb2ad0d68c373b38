"""README.md with two authors: the user's text and metadata, and one generated section.

The section stands between two comments. Everything else in the file is the user's and is kept
byte for byte, except for `model-index`. Not here: what the section says (`hub.card`).
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
"""Metadata that a quantized model inherits from its base model."""

logger = logging.getLogger(__name__)


def merge(text: str, metadata: Mapping[str, Any], section: str) -> str:
    """A README.md with metadata keys that it lacks, and with the generated section.

    A key that exists keeps its value. In `model-index` a result of the same task, dataset and
    metric gets the new value; the others stay.

    Args:
        text: of the README.md.
        metadata: keys and values for its head.
        section: text to put between the two comments; it replaces what is there, or is added at the end.

    Raises:
        ValueError: the metadata are no YAML mapping, or only one of the two comments is there.

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
    """The text of a README.md with its line ends unchanged; empty where there is no such file.

    Args:
        file: its path.
        errors: "replace" also reads what is not UTF-8.

    Raises:
        ValueError: it is not UTF-8.
    """
    try:
        return file.read_bytes().decode(errors=errors) if file.is_file() else ""
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 text ({error}); convert or remove it") from error


def metadata_of(text: str) -> dict[str, Any]:
    """The metadata at the head of a README.md; empty where there are none.

    Args:
        text: of the README.md.

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


NO_BASE = "its README.md names no base model, by which it is found on the Hub: --base-model user/model"


def names_base(folder: str | Path) -> bool:
    """Whether the metadata of a folder's README.md name the base model.

    Args:
        folder: of a model.
    """
    return bool(metadata_of(read_text(Path(folder) / README)).get("base_model"))


def base_metadata(card: str, base_model: str | None) -> dict[str, Any]:
    """Metadata of a quantized model that come from its base model's card.

    Where the base is a folder and has no name on the Hub, its own `base_model` is taken over: a quantized
    fine-tune of X is a fine-tune of X, too. A card that cannot be read is left out with a warning.

    Args:
        card: text of the base model's card.
        base_model: its name on the Hub; None: it is a folder.

    Returns:
        The keys `COPIED`, `base_model` and `base_model_relation`, as far as known.
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
    """The text between the two comments; empty where they are not there."""
    body = _split(text)[1]
    begin, end = body.find(BEGIN), body.find(END)
    return body[begin + len(BEGIN) : end].strip() if 0 <= begin < end else ""


def own_text(text: str) -> str:
    """The text outside the metadata and the generated section."""
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
    """`text` with missing keys added after the existing ones, whose lines stay as they are."""
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
    """`text` with these results in its `model-index`; all of its metadata are rewritten for that."""
    try:
        card = ModelCard(text)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{README}: its {RESULTS} cannot be read ({error}); repair or remove it") from error
    _, new = model_index_to_eval_results(model_index)
    data: Any = card.data
    kept = [one for one in data.eval_results or [] if not any(one.is_equal_except_value(two) for two in new)]
    data.eval_results = kept + new
    return str(card)
