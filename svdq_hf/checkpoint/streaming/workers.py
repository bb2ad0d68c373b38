"""Worker processes that make shards: shards are handed out one by one, and a death is noticed and named.

Not here: several machines; accelerate starts those, and `checkpoint.streaming.resume` takes this one's share.
"""

import multiprocessing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.progress import TransferSpeedColumn as SpeedColumn
from transformers.utils import logging as hf_logging

from svdq_hf.checkpoint.streaming.plan import Shard
from svdq_hf.checkpoint.streaming.shard import Told, make_shard
from svdq_hf.config import SVDQConfig


@contextmanager
def progress_bar(title: str, total: int) -> Iterator[Told]:
    """Context manager: a progress bar that transformers' `disable_progress_bar` hides.

    Args:
        title: in front of the bar.
        total: bytes in all.

    Yields:
        A function that is called with the number of bytes done.
    """
    columns = (TextColumn(title), BarColumn(), DownloadColumn(), SpeedColumn(), TimeRemainingColumn())
    hidden = not hf_logging.is_progress_bar_enabled()
    with Progress(*columns, console=Console(stderr=True), disable=hidden) as progress:
        task = progress.add_task(title, total=total)
        yield lambda count: progress.update(task, advance=count)


def make_shards(shards: Sequence[Shard], config: SVDQConfig, folder: Path, workers: int) -> None:
    """Make the data of some shards, in this process or in worker processes.

    Args:
        shards: what to make.
        config: how weights are quantized.
        folder: where the work is done.
        workers: number of processes; 1: this process.

    Raises:
        ValueError: a weight cannot be quantized; the shards that other workers are making are finished first.
        RuntimeError: a worker died; it names each, and the other shards are made.
    """
    with progress_bar("Quantizing", sum(shard.input_size for shard in shards)) as told:
        if workers == 1:
            for shard in shards:
                make_shard(shard, config, folder, told)
        elif shards:
            _Workers(min(workers, len(shards)), config, folder).run(list(shards), told)


def _work(pipe: Connection, config: SVDQConfig, folder: Path, threads: int) -> None:
    """Loop of a worker: receives shards; sends numbers of bytes read, then None, or an error."""
    torch.set_num_threads(threads)
    try:
        while (shard := pipe.recv()) is not None:
            make_shard(shard, config, folder, pipe.send)
            pipe.send(None)
    except (ValueError, OSError) as error:
        pipe.send(error)
    except KeyboardInterrupt:  # the terminal tells all processes; the parent says what there is to say
        pass


class _Workers:
    """Processes, each with a pipe, its share of the threads, and the shard that it is making."""

    def __init__(self, count: int, config: SVDQConfig, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
        threads = max(1, torch.get_num_threads() // count)
        self.processes: dict[Connection, Any] = {}
        self.shards: dict[Connection, Shard] = {}
        self.deaths: list[str] = []
        self.errors: list[Exception] = []
        for number in range(1, count + 1):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_work, args=(theirs, config, folder, threads), name=f"worker {number}", daemon=True
            )
            process.start()
            theirs.close()  # or the end of a dead worker's pipe would stay open here
            self.processes[ours] = process

    def run(self, shards: list[Shard], told: Told) -> None:
        """Hand out shards until none or no worker is left, or one has failed; then raise what happened."""
        shards.reverse()
        try:
            for pipe in list(self.processes):
                self._next(pipe, shards)
            while self.shards:
                for ready in wait(list(self.shards)):
                    self._hear(ready, shards, told)  # type: ignore[arg-type]
        finally:
            for process in self.processes.values():
                process.terminate() if self.shards else process.join()
        if self.errors:
            raise self.errors[0]
        if self.deaths:
            raise RuntimeError(f"{'; '.join(self.deaths)}. Run the same command again for what is missing")

    def _next(self, pipe: Connection, shards: list[Shard]) -> None:
        """Give a worker its next shard, or end it."""
        self.shards.pop(pipe, None)
        following = shards.pop() if shards and not self.errors else None
        if following is not None:
            self.shards[pipe] = following
        try:
            pipe.send(following)
        except BrokenPipeError:  # it died meanwhile
            if following is not None:
                self._died(pipe)

    def _hear(self, pipe: Connection, shards: list[Shard], told: Told) -> None:
        try:
            message = pipe.recv()
        except EOFError:
            self._died(pipe)
            return
        if isinstance(message, int):
            told(message)
        elif message is None:
            self._next(pipe, shards)
        else:
            self.errors.append(message)
            self.shards.pop(pipe)

    def _died(self, pipe: Connection) -> None:
        process, shard = self.processes[pipe], self.shards.pop(pipe)
        process.join()
        code = process.exitcode
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        self.deaths.append(f"{process.name} (process {process.pid}) died by {how} at {shard.file}")
