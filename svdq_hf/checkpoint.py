"""A model's folder -> a quantized model's folder, complete or not there at all.

The work is done in a hidden folder beside the target, which is renamed when everything in it is
written, so that a kill or a full disk leaves nothing that looks whole. Only safetensors are read and
no code of the model's author is run. Where it can be, the model is streamed (`streaming`), and a run that
was interrupted goes on; else it is quantized in memory.
"""

import json
import logging
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoModel

from svdq_hf.card import write_card
from svdq_hf.companions import COMPANIONS, copy_companions
from svdq_hf.config import SVDQConfig
from svdq_hf.footprint import Footprint, read_footprint
from svdq_hf.hub import explained
from svdq_hf.inplace import quantize_model
from svdq_hf.opening import check_is_folder, weight_files
from svdq_hf.readme import README, read_text
from svdq_hf.selection import all_names, linear_layers, unmatched
from svdq_hf.source import listed, load_complete, model_class
from svdq_hf.streaming.plan import make_plan
from svdq_hf.streaming.run import check_disk, stream
from svdq_hf.streaming.units import Unstreamable

REPORT_FILE = "svdq_report.json"
SHARD_SIZE = "1GB"
"""A run that is cut off loses what it has done of one file."""

NAMES_SHOWN = 6
OTHER_WEIGHTS = ["consolidated*"]
"""Of Mistral's repositories: the same weights again, for another library."""

logger = logging.getLogger(__name__)


def quantize_checkpoint(
    model: str | Path,
    out: str | Path,
    config: SVDQConfig,
    *,
    shard_size: str = SHARD_SIZE,
    workers: int = 1,
    restart: bool = False,
) -> Footprint:
    """Quantize a model, given by folder or Hub name, into the folder `out`; what it weighs then.

    shard_size: of a file of the output, such as "500MB"; what is done when a run is cut off is kept by file.
    workers: processes that share the work and this process's threads.
    restart: whether to throw away what an earlier run, cut off, has done for `out`.

    Raises:
        ValueError: `out` is there and not empty; the model is quantized already, has no safetensors
            file, is damaged, needs code of its own, or is refused by `from_pretrained`; the disk is too
            small; a run that was cut off had another input or other choices.
        RuntimeError: a worker died.
        OSError: the disk is full, the model is not there, or another run is at work for `out`.
    """
    target = Path(out).absolute()
    check_target(out)
    size = parse_size(shard_size)
    if workers < 1:
        raise ValueError(f"workers={workers}: must be 1 or more")
    source = local_folder(model)

    def finish(work: Path) -> None:
        copy_companions(source, work)
        (work / REPORT_FILE).write_text(json.dumps(read_footprint(work).to_dict(), indent=1) + "\n")
        name = None if Path(model).is_dir() else str(model)
        write_card(work, base_model=name, base_card=read_text(source / README, "replace"))
        put_in_place(work, target)

    try:
        plan = make_plan(model_class(source), source, config, size)
    except Unstreamable as reason:
        unused = "" if workers == 1 else "; workers are not used"
        logger.warning("%s is quantized in memory, not streamed: %s%s", model, reason, unused)
        state = PartialState()
        if state.is_main_process:  # of `accelerate launch`
            _in_memory(source, target, config, shard_size, reason.footprint, finish)
        state.wait_for_everyone()
    else:
        stream(plan, unfinished_folder(out), finish, workers=workers, restart=restart)
    return read_footprint(target)


def _in_memory(
    source: Path,
    target: Path,
    config: SVDQConfig,
    shard_size: str,
    weighs: Footprint | None,
    finish: Callable[[Path], None],
) -> None:
    """Quantize a model as a whole. weighs: what will be written, where that is known."""
    check_disk(target.parent, weighs.total_bytes if weighs is not None else folder_bytes(source))
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as hidden:
        work = Path(hidden) / "model"
        quantized = _quantized(model_class(source), source, config)
        quantized.save_pretrained(work, max_shard_size=shard_size)
        finish(work)


def check_target(out: str | Path) -> None:
    """Refuse to write into a folder that holds anything.

    Raises:
        ValueError: `out` is there and not an empty folder.
    """
    target = Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{out} is there already and not empty; name another folder or remove it")


def put_in_place(work: Path, target: Path) -> None:
    """Give a folder that is whole its name; `target` is not there, or empty."""
    if target.exists():
        target.rmdir()  # empty, or this fails and nothing is lost
    os.rename(work, target)


def unfinished_folder(out: str | Path) -> Path:
    """Where the work for `out` is done until it is whole."""
    target = Path(out).absolute()
    return target.with_name(f".{target.name}.unfinished")


def parse_size(text: str) -> int:
    """Bytes of a size such as "500MB".

    >>> parse_size("1.5GB")
    1500000000
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]B)", text.strip().upper())
    size = int(float(match[1]) * 1000 ** (1 + "KMGT".index(match[2][0]))) if match else 0
    if size == 0:
        raise ValueError(f"shard size {text!r}: must be a number and KB, MB, GB or TB, such as 500MB")
    return size


def local_folder(model: str | Path) -> Path:
    """The folder of a model: itself, or a copy of the Hub's, without code and pickles.

    Raises:
        ValueError: neither a folder nor a name that the Hub could have.
        OSError: the Hub does not have it, or cannot be reached.
    """
    if Path(model).is_dir():
        return Path(model)
    name = str(model)
    if Path(model).is_file():
        check_is_folder(model)
    if name.count("/") > 1 or name.startswith(("/", "./", "../", "~")):
        raise ValueError(f"{name}: no such folder (and not a Hub name, which is user/model)")
    told = name if "/" in name else f"{name} (no such folder is here)"
    patterns = ["*.safetensors", README, *(f"*{suffix}" for suffix in COMPANIONS)]
    with explained(told):
        return Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=OTHER_WEIGHTS))


def check_names(folder: str | Path, config: SVDQConfig) -> None:
    """Refuse names of modules to keep dense that match nothing; the model is built without weights.

    Quantizing itself only warns: a config may be meant for many models, a command line is for one.

    Raises:
        ValueError: a name matches no linear layer of the model in `folder`; see also `quantize_checkpoint`.
    """
    if not config.modules_to_not_convert:
        return
    names = all_names(linear_layers(_empty_model(Path(folder))))
    unknown = unmatched(names, config)
    if unknown:
        kinds: dict[str, str] = {}  # layers that differ by a number only are one kind
        for name in names:
            kinds.setdefault(re.sub(r"\d+", "#", name), name)
        shown = list(kinds.values())[:NAMES_SHOWN]
        raise ValueError(
            f"{', '.join(map(repr, unknown))} matches no linear layer of {folder}; there are "
            f"{', '.join(shown)}{', ...' if len(shown) < len(names) else ''} (a name matches from the start, "
            "as a regular expression like '.*attention.*', or as an end)"
        )


def folder_bytes(folder: str | Path) -> int:
    """Bytes of the safetensors files that are read from a folder.

    Raises:
        ValueError: see `weight_files`.
    """
    return sum(file.stat().st_size for file in weight_files(folder))


def _quantized(kind: Any, source: Path, config: SVDQConfig) -> Any:
    """The quantized model; one that makes its own batches runs dense first, so it is loaded whole."""
    choices = {} if config.synthetic else {"quantization_config": config}
    model, new = load_complete(kind, source, named=config.modules_to_not_convert or (), **choices)
    if new:
        logger.warning(
            "%s: %s not in its files, and random in the quantized model: train it", source, listed(new)
        )
    return quantize_model(model, config) if config.synthetic else model


def _empty_model(source: Path) -> Any:
    """The model of a folder, on the meta device."""
    kind = model_class(source)
    config = AutoConfig.from_pretrained(source, local_files_only=True)
    build = kind.from_config if kind is AutoModel else kind
    with torch.device("meta"):
        return build(config)
