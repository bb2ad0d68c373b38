"""Quantization of a checkpoint: a model's folder -> a quantized model's folder, complete or not there at all.

The work is done in a hidden folder beside the target, which is renamed when everything in it is
written, so that a kill or a full disk leaves nothing that looks complete. Only safetensors are read and
no code of the model's author is run. Where possible the model is streamed (`checkpoint.streaming`), and a run
that was interrupted goes on; otherwise it is quantized in memory.
"""

import json
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, Unpack

from accelerate import PartialState

from svdq_hf.checkpoint.companion_files import copy_companions
from svdq_hf.checkpoint.folders import (
    A_CONFIG,
    A_SIZE,
    A_SOURCE,
    SHARD_SIZE,
    check_disk,
    check_dtype,
    check_target,
    check_workers,
    parse_size,
    put_in_place,
)
from svdq_hf.checkpoint.in_memory import checked_batches, quantized_in_memory
from svdq_hf.checkpoint.source import Source
from svdq_hf.checkpoint.streaming.plan import make_plan
from svdq_hf.checkpoint.streaming.resume import stream
from svdq_hf.checkpoint.streaming.unit import Unstreamable
from svdq_hf.checkpoint.unfinished import unfinished_folder, work_folder
from svdq_hf.config import SVDQConfig
from svdq_hf.core.arguments import checked_arguments
from svdq_hf.format.files import REPORT_FILE, folder_bytes
from svdq_hf.hub.card import write_card
from svdq_hf.hub.card_facts import dense_layers
from svdq_hf.hub.readme import README, read_text
from svdq_hf.integrations.transformers.in_memory import AS_BATCHES
from svdq_hf.quantize.footprint import Footprint, read_footprint
from svdq_hf.quantize.input_statistics import check_loss
from svdq_hf.quantize.selection import all_names, kept_by_name, linear_layers, unmatched

KINDS_SHOWN = 6

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """What quantizing a checkpoint resulted in.

    Attributes:
        footprint: of the output.
        bytes_before: of the source's safetensors files.
        bytes_after: of the output's.
        dense: linear layers that stayed dense, one entry for those that differ by a number; None: not known.
    """

    footprint: Footprint
    bytes_before: int
    bytes_after: int
    dense: tuple[str, ...] | None


class Run(TypedDict, total=False):
    """What `quantize_checkpoint` takes beside a model, a folder and a config.

    Attributes:
        shard_size: size of a file of the output, such as "500MB"; a run that is cut off keeps whole files.
        workers: processes that share the work and this process's threads.
        restart: whether to discard what an earlier run for the same output, cut off, has done.
        batches: calibration batches, where the config needs data; the model is then quantized in memory.
        dtype: of what stays dense, such as "bfloat16"; None: as in the files.
        base_model: name on the Hub of the model that is quantized, for the card; None: known only of a name.
    """

    shard_size: str
    workers: int
    restart: bool
    batches: Iterable[Any] | None
    dtype: str | None
    base_model: str | None


@checked_arguments(model=A_SOURCE, config=A_CONFIG, shard_size=A_SIZE, batches=AS_BATCHES)
def quantize_checkpoint(
    model: str | Path | Source,
    out: str | Path,
    config: SVDQConfig,
    **run: Unpack[Run],
) -> Footprint:
    """Quantize a model into a folder.

    Every tensor of the model's files is in the output or is named: in a warning where the model's class
    leaves it out, or by the user (`Source.resolve(model, drop=[...])`). Otherwise nothing is written.

    Args:
        model: a folder, the Hub's user/model, or a `Source`.
        out: folder to write; must not exist, or be empty.
        config: how the model is quantized.
        **run: see `Run`.

    Returns:
        The footprint of the output.

    Raises:
        TypeError: an argument is of a wrong type (`WrongKind`, which is a ValueError as well).
        ValueError: `out` exists and is not empty, or cannot be replaced; the model is quantized already, has
            no safetensors file, is damaged, needs its author's code, has tensors that its class does not
            know, or is refused by `from_pretrained`; the disk is too small; a run that was cut off had
            another input or other choices.
        RuntimeError: a worker died.
        OSError: the disk is full, the model is not there, or another run is at work for `out`.
    """
    return quantize_source(model, out, config, **run).footprint


def quantize_source(
    model: str | Path | Source,
    out: str | Path,
    config: SVDQConfig,
    **run: Unpack[Run],
) -> Result:
    """`quantize_checkpoint` with everything it has found out.

    Args:
        model: a folder, the Hub's user/model, or a `Source`.
        out: folder to write.
        config: how the model is quantized.
        **run: see `Run`.

    Returns:
        Footprint, bytes, and layers that stayed dense.

    Raises:
        ValueError: see `quantize_checkpoint`; also for its other errors.
    """
    target = Path(out).absolute()
    check_target(out)
    shard_size, workers, restart = (
        run.get("shard_size", SHARD_SIZE),
        run.get("workers", 1),
        run.get("restart", False),
    )
    size, dtype = parse_size(shard_size), run.get("dtype")
    check_workers(workers)
    check_dtype(dtype)
    batches = checked_batches(config, run.get("batches"))
    source = Source.resolve(model)
    source.check()
    check_loss(source.empty, config)
    found: list[Result] = []

    def finish(work: Path) -> None:
        found.append(_finish(source, work, run.get("base_model")))
        put_in_place(work, target)

    try:
        plan = make_plan(source, config, size, dtype, has_data=batches is not None)
    except Unstreamable as reason:
        unused = "" if workers == 1 else "; workers are not used"
        logger.warning("%s is quantized in memory, not streamed: %s%s", source, reason, unused)
        state = PartialState()
        if state.is_main_process:  # of `accelerate launch`
            weighs = reason.footprint.total_bytes if reason.footprint is not None else source.bytes
            check_disk(target.parent, weighs)
            with work_folder(out, restart=restart) as work:
                made = quantized_in_memory(source, config, batches, dtype)
                made.save_pretrained(work, max_shard_size=shard_size)
                finish(work)
        state.wait_for_everyone()
    else:
        stream(plan, unfinished_folder(out), finish, workers=workers, restart=restart)
    return found[0] if found else _result(source, target)  # of `accelerate launch`, one process finishes


def _finish(source: Source, work: Path, base_model: str | None) -> Result:
    """Check what was written, and add companion files, report and model card."""
    source.check_written(work)
    copy_companions(source.folder, work)
    result = _result(source, work)
    sizes = {"bytes_before": result.bytes_before, "bytes_after": result.bytes_after}
    report = {**sizes, **result.footprint.to_dict()}
    (work / REPORT_FILE).write_text(json.dumps(report, indent=1) + "\n")
    write_card(
        work,
        footprint=result.footprint,
        dense=result.dense,
        bytes_before=result.bytes_before,
        base_model=base_model or source.name,
        base_card=read_text(source.folder / README, "replace"),
    )
    return result


def _result(source: Source, folder: Path) -> Result:
    written = read_footprint(folder)
    stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    dense = dense_layers(source.empty, written, SVDQConfig.from_dict(stored), folder)
    return Result(written, source.bytes, folder_bytes(folder), tuple(dense) if dense is not None else None)


def check_names(model: str | Path | Source, config: SVDQConfig) -> dict[str, list[str]]:
    """Refuse names in `modules_to_not_convert` that match no layer; the model is built without weights.

    Quantizing itself only warns, since a config may be meant for many models; a command line is for one.

    Args:
        model: a folder, the Hub's user/model, or a `Source`.
        config: the config.

    Returns:
        The layers that each name keeps dense.

    Raises:
        ValueError: a name matches no linear layer of the model; see also `quantize_checkpoint`.
    """
    if not config.modules_to_not_convert:
        return {}
    source = Source.resolve(model)
    names = all_names(linear_layers(source.empty))
    unknown = unmatched(names, config)
    if unknown:
        kinds: dict[str, str] = {}  # layers that differ by a number only are one kind
        for name in names:
            kinds.setdefault(re.sub(r"\d+", "#", name), name)
        shown = list(kinds.values())[:KINDS_SHOWN]
        raise ValueError(
            f"{', '.join(map(repr, unknown))} matches no linear layer of {source}; there are "
            f"{', '.join(shown)}{', ...' if len(shown) < len(names) else ''} (a name matches from the start, "
            "as a part between dots, as an end, or as a regular expression like '.*attention.*')"
        )
    return kept_by_name(names, config)
