"""Calibration batches from a text file: windows spread evenly over it, as the model reads them.

For scores and error feedback that need data, from the command line. Not here: the statistics of the inputs
(`calibration.inputs`), batches without data (`calibration.synthetic`), and data of other kinds (pictures,
sound), for which a program calls `quantize_model(model, config, batches)`.
"""

import json
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

SAMPLES, LENGTH = 16, 512
"""Windows of a text, and their tokens: 8192 together, as many as all figures in docs/ were measured with."""

ROWS = 4
"""Windows in a batch."""

logger = logging.getLogger(__name__)


def text_batches(
    file: str | Path, folder: str | Path, model: nn.Module, *, samples: int = SAMPLES, length: int = LENGTH
) -> list[dict[str, Tensor]]:
    """Batches for `quantize_model` from a text file, by the tokenizer in the model's folder.

    Args:
        file: a text, UTF-8.
        folder: of the model, its tokenizer beside it.
        model: the model, which may be without weights; only its kind and its longest input are looked at.
        samples: windows; fewer where the text is shorter, which the log says.
        length: tokens of a window, special tokens included; fewer where the model takes fewer.

    Returns:
        Batches of keyword arguments, token ids `[rows, length]`, int64.

    Raises:
        ValueError: no such file, a text of fewer than two tokens, a count below 1, a folder without
            tokenizer, or a model that reads no token ids.
    """
    _check(file, model, samples, length)
    tokenizer = _tokenizer(folder)
    before, after = _ends(tokenizer, model)
    room = min(length, longest_input(model) or length) - len(before) - len(after)
    ids = tokenizer(read_text(file), add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) < 2 or room < 1:
        raise ValueError(f"{file}: {len(ids)} tokens, in windows of {length}: at least 2 are needed")
    if len(ids) < samples * room:
        logger.warning(
            "%s has %d tokens: %d windows, not %d", file, len(ids), max(1, len(ids) // room), samples
        )
    windows = [before + window + after for window in _spread(ids, samples, room)]
    names = [
        "input_ids",
        *(["decoder_input_ids"] if getattr(model.config, "is_encoder_decoder", False) else []),
    ]
    return [dict.fromkeys(names, part) for part in torch.split(torch.tensor(windows), ROWS)]


def read_text(file: str | Path) -> str:
    """A plain text, or the texts of a .jsonl file: of each line "text", or else all there is, in order.

    Args:
        file: its path.

    Raises:
        ValueError: it is not in UTF-8, or its lines are no JSON objects of texts.
    """
    path = Path(file)
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix != ".jsonl":
            return text
        lines = map(json.loads, text.splitlines())
        return "\n\n".join(line["text"] if "text" in line else "".join(line.values()) for line in lines)
    except (UnicodeDecodeError, json.JSONDecodeError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file}: no text in UTF-8, or no lines of JSON with texts in them ({error})"
        ) from error


def _spread(ids: list[int], samples: int, room: int) -> list[list[int]]:
    """Windows of `room` tokens whose starts are spread evenly over a text, without overlaps.

    >>> _spread(list(range(10)), 2, 3)
    [[0, 1, 2], [5, 6, 7]]
    """
    room = min(room, len(ids))
    count = min(samples, len(ids) // room)
    starts = [number * len(ids) // count for number in range(count)]
    return [ids[start : start + room] for start in starts]


def _ends(tokenizer: Any, model: Any) -> tuple[list[int], list[int]]:
    """Special tokens before and after a window: as texts have them that the model was trained on."""
    first = tokenizer.bos_token_id if tokenizer.cls_token_id is None else tokenizer.cls_token_id
    writes = callable(getattr(model, "can_generate", None)) and model.can_generate()
    last = None if writes else tokenizer.sep_token_id
    return ([] if first is None else [first]), ([] if last is None else [last])


def longest_input(model: Any) -> int | None:
    """The most tokens that a model's positions allow; None where its config sets no limit.

    RoBERTa's positions begin after the padding token's.

    Args:
        model: the model; its weights are not looked at.
    """
    length: object = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(length, int) or length < 1:
        return None
    for name, module in model.named_modules():
        padding = getattr(module, "padding_idx", None) if name.endswith("position_embeddings") else None
        if padding is not None and getattr(module, "num_embeddings", None) == length:
            return length - int(padding) - 1
    return length


def _tokenizer(folder: str | Path) -> Any:
    try:
        found = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, TypeError) as error:
        raise _no_tokenizer(folder) from error
    if len(found) < 2:  # transformers makes an empty one where there is none
        raise _no_tokenizer(folder)
    return found


def _no_tokenizer(folder: str | Path) -> ValueError:
    return ValueError(
        f"{folder} has no tokenizer that can be loaded, which calibration needs: save the model's own there, "
        f"tokenizer.save_pretrained({str(folder)!r})"
    )


def _check(file: str | Path, model: Any, samples: int, length: int) -> None:
    if not Path(file).is_file():
        raise ValueError(f"{file}: no such file; calibration takes a text file")
    for name, count in (("samples", samples), ("length", length)):
        if count < 1:
            raise ValueError(f"{name}={count}: must be 1 or more")
    if getattr(model, "main_input_name", "") != "input_ids":
        raise ValueError(
            f"{type(model).__name__} reads no token ids, so no text can calibrate it: call "
            "quantize_model(model, config, batches) in Python, with batches of its own inputs"
        )
