"""Execution of a plan, resumable: what an earlier run has made in the folder is checked, the rest is made.

`accelerate launch` splits the shards over its processes, which must all see the folder: the first of them
prepares it, and puts everything together when all have finished. Not here: one shard
(`checkpoint.streaming.shard`), and processes on one machine (`checkpoint.streaming.workers`).
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accelerate import PartialState

from svdq_hf.checkpoint.folders import check_disk
from svdq_hf.checkpoint.streaming.plan import Shard, StreamPlan
from svdq_hf.checkpoint.streaming.shard import (
    add_header,
    data_file,
    finished_record,
    read_record,
    record_file,
)
from svdq_hf.checkpoint.streaming.workers import make_shards, progress_bar
from svdq_hf.checkpoint.unfinished import PLAN_FILE, check_own, empty, locked, model_folder, remove_old
from svdq_hf.format.files import full_disk_named, write_atomically
from svdq_hf.quantize.encoding import made_by

MADE_BY = ("svdq_hf", "torch")
"""Packages that might make other bytes in another version; so might torch without the native library."""

logger = logging.getLogger(__name__)


def stream(
    plan: StreamPlan, folder: Path, finish: Callable[[Path], None], *, workers: int = 1, restart: bool = False
) -> None:
    """Make the files of a plan in a folder.

    Args:
        plan: of the output.
        folder: where the work is done; it is removed at the end.
        finish: called with the folder of the complete model, inside `folder`.
        workers: processes that share the work.
        restart: whether to discard what an earlier run has left in `folder`.

    Raises:
        ValueError: an earlier run had another input or other choices; too little disk; a weight that cannot
            be quantized, and then nothing is kept.
        RuntimeError: a worker died.
        OSError: another run is at work in `folder`, or the disk failed.
    """
    state = PartialState()
    if state.is_main_process:
        check_own(folder)
        check_disk(folder.parent, bytes_needed(plan, folder))
        folder.mkdir(parents=True, exist_ok=True)
    state.wait_for_everyone()
    with locked(folder, wanted=state.is_main_process):
        if state.is_main_process:
            _prepare(plan, folder, restart)
        state.wait_for_everyone()
        with full_disk_named(folder.parent), _kept(folder):
            _make(plan, folder, workers, state)
            state.wait_for_everyone()
            if state.is_main_process:
                _put_together(plan, folder)
                _finished(finish, folder)
    state.wait_for_everyone()


def _finished(finish: Callable[[Path], None], folder: Path) -> None:
    """Hand the whole model on; what is found wrong in it then would be found again, so it does not stay."""
    try:
        finish(model_folder(folder))
    except ValueError:
        shutil.rmtree(folder)
        raise
    shutil.rmtree(folder)


@contextmanager
def _kept(folder: Path) -> Iterator[None]:
    """Context manager that tells, when the work is cut off, where it is kept."""
    try:
        yield
    except ValueError:
        raise
    except BaseException:
        logger.warning("what is done is kept in %s: run the same command again to go on", folder)
        raise


def bytes_needed(plan: StreamPlan, folder: Path) -> int:
    """Disk that the work needs at its peak, beyond what `folder` holds (which is reused or deleted first).

    Args:
        plan: of the output.
        folder: where the work is done.
    """
    there = 0
    for shard in plan.shards:
        for file in (data_file(shard, folder), model_folder(folder) / shard.file):
            there += min(512 * file.stat().st_blocks, shard.size) if file.exists() else 0
    # A shard is there twice while it gets its header; a header has some hundred bytes for each layer.
    largest = max(shard.size for shard in plan.shards)
    return plan.size + largest + len(plan.shards) * 512 * len(plan.footprint.layers) - there


def _prepare(plan: StreamPlan, folder: Path, restart: bool) -> None:
    """Prepare the folder: begin it, or check that it was begun for this plan."""
    noted = folder / PLAN_FILE
    if restart or not noted.exists():  # without a plan, it is what work in memory has left (`work_folder`)
        empty(folder)
    remove_old(folder)
    model_folder(folder).mkdir(exist_ok=True)
    facts = _plan_facts(plan)
    if not noted.exists():
        write_atomically(noted, json.dumps(facts, indent=1))
        return
    before = _noted(noted)
    for what, now in facts.items():
        if before.get(what) != now:
            told = ", ".join(_different(before.get(what), now))
            raise ValueError(
                f"{folder} was begun with another {what} ({told}): repeat that command to go on with it, "
                "or begin anew with --restart"
            )


def _noted(file: Path) -> dict[str, Any]:
    """The facts that the first run has recorded of its plan."""
    try:
        before: dict[str, Any] = dict(json.loads(file.read_text()).items())
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file}: damaged ({error!r}); begin anew with --restart") from error
    return before


def _plan_facts(plan: StreamPlan) -> dict[str, dict[str, Any]]:
    """Everything that the output depends on, in types that JSON has; the input by its sizes and headers."""
    return {
        "input": {Path(file).name: _file_facts(file) for file in plan.files},
        "config": json.loads(json.dumps(plan.config.to_dict())),
        "shard size": {shard.file: shard.size for shard in plan.shards},
        "release": {package: version(package) for package in MADE_BY} | {"native library": made_by()},
    }


def _file_facts(file: str) -> list[Any]:
    with open(file, "rb") as opened:
        length = opened.read(8)
        header = opened.read(int.from_bytes(length, "little"))
    return [Path(file).stat().st_size, hashlib.sha256(header).hexdigest()]


def _different(before: Any, now: dict[str, Any]) -> list[str]:
    """The keys under which two dicts differ."""
    before = before if isinstance(before, dict) else {}
    return [key for key in {**before, **now} if before.get(key) != now.get(key)]


def _make(plan: StreamPlan, folder: Path, workers: int, state: PartialState) -> None:
    """Make those shards of this process that are missing."""
    mine = plan.shards[state.process_index :: state.num_processes]
    missing = _missing(mine, folder)
    try:
        make_shards(missing, plan.config, folder, workers)
    except ValueError:
        if state.num_processes == 1:  # with these choices this input will never do; others may be at work
            shutil.rmtree(folder)
        raise


def _missing(shards: Sequence[Shard], folder: Path) -> list[Shard]:
    """The shards that an earlier run has not finished; finished ones are checked."""
    begun = [shard for shard in shards if record_file(shard, folder).exists()]
    if not begun:
        return list(shards)
    with progress_bar("Checking what is there", sum(shard.input_size for shard in begun)) as told:
        done = {shard.number for shard in begun if finished_record(shard, folder, told)}
    return [shard for shard in shards if shard.number not in done]


def _put_together(plan: StreamPlan, folder: Path) -> None:
    """Add the header to every shard, and write config and index."""
    facts: dict[str, dict[str, float]] = {}
    for shard in plan.shards:
        record = read_record(shard, folder)
        if record is None:
            raise OSError(f"{folder}: {shard.file} is not there; do all processes see this folder?")
        facts |= record["facts"]
    metadata = plan.metadata(facts)
    for shard in plan.shards:
        add_header(shard, metadata, folder)
    plan.write_config(model_folder(folder))
