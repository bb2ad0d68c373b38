"""A model's folder -> a quantized model's folder, complete or not there at all.

The work is done in a hidden folder beside the target, which is renamed when everything in it is
written, so that a kill or a full disk leaves nothing that looks whole. Only safetensors are read and
no code of the model's author is run. Where it can be, the model is streamed (`streaming`), and a run that
was interrupted goes on; else it is quantized in memory.
"""

import json
import logging
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import PartialState

from svdq_hf.checkpoint.companion_files import copy_companions
from svdq_hf.checkpoint.folders import (
    REPORT_FILE,
    SHARD_SIZE,
    check_target,
    parse_size,
    put_in_place,
    unfinished_folder,
)
from svdq_hf.checkpoint.source import empty_model, listed, load_complete, model_class
from svdq_hf.checkpoint.streaming.plan import make_plan
from svdq_hf.checkpoint.streaming.resume import check_disk, stream
from svdq_hf.checkpoint.streaming.unit import Unstreamable
from svdq_hf.config import SVDQConfig
from svdq_hf.format.files import folder_bytes
from svdq_hf.hub.card import write_card
from svdq_hf.hub.client import local_folder
from svdq_hf.hub.readme import README, read_text
from svdq_hf.integrations.transformers.in_memory import quantize_model
from svdq_hf.quantize.footprint import Footprint, read_footprint
from svdq_hf.quantize.selection import all_names, linear_layers, unmatched

NAMES_SHOWN = 6

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


def check_names(folder: str | Path, config: SVDQConfig) -> None:
    """Refuse names of modules to keep dense that match nothing; the model is built without weights.

    Quantizing itself only warns: a config may be meant for many models, a command line is for one.

    Raises:
        ValueError: a name matches no linear layer of the model in `folder`; see also `quantize_checkpoint`.
    """
    if not config.modules_to_not_convert:
        return
    names = all_names(linear_layers(empty_model(Path(folder))))
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


def _quantized(kind: Any, source: Path, config: SVDQConfig) -> Any:
    """The quantized model; one that makes its own batches runs dense first, so it is loaded whole."""
    choices = {} if config.synthetic else {"quantization_config": config}
    model, new = load_complete(kind, source, named=config.modules_to_not_convert or (), **choices)
    if new:
        logger.warning(
            "%s: %s not in its files, and random in the quantized model: train it", source, listed(new)
        )
    return quantize_model(model, config) if config.synthetic else model
