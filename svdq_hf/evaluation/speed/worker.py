"""A process that holds one model and times it: `python -m svdq_hf.evaluation.speed.worker`.

Fresh, so that memory is the model's own, and loading pays for what loading costs. It reads requests from
standard input and answers each on standard output, a line of JSON each (`evaluation.speed.process` is the
other end); whatever libraries print goes to standard error. Several may live side by side and be asked in
turn, so that what disturbs the machine disturbs all of them. Not here: what is asked, in which order.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

import torch
import transformers

from svdq_hf.checkpoint.source import Source
from svdq_hf.config import SVDQConfig
from svdq_hf.evaluation.speed.kernel_paths import kernel_paths
from svdq_hf.evaluation.speed.memory import Memory, memory_now, watched
from svdq_hf.evaluation.speed.peers import PEERS
from svdq_hf.evaluation.speed.shares import shared
from svdq_hf.evaluation.speed.workload import Workload
from svdq_hf.nn.inventory import number_of_weights

THREADS_COME_UP = 256
"""Rows of a product that starts the threads of torch, whose stacks are not the model's memory."""


class Worker:
    """The model of this process, and the answers to requests."""

    def __init__(self) -> None:
        self.work: Workload | None = None
        self.before = Memory(None, None)
        self.inputs: dict[int, Any] = {}

    def load(
        self,
        folder: str,
        dtype: str | None = None,
        quantize: dict[str, Any] | None = None,
        peer: str | None = None,
        dequantize: bool = False,
    ) -> dict[str, Any]:
        """Load a model, watched.

        Args:
            folder: of the model, dense or quantized.
            dtype: of what is dense, such as "bfloat16"; None: as stored.
            quantize: keywords of an SVDQConfig that quantizes it on the way.
            peer: a word of `PEERS` that does.
            dequantize: whether a quantized model is made dense after it was loaded.

        Returns:
            `seconds`, and `resident` and `anonymous`, the peaks above the interpreter's own memory; the
            name of its `kind`, its `parameters`, whether it `writes`, and its `threads`.
        """
        source = Source.resolve(folder)
        kind = Source.resolve(source, packed="quantization_config" in source.stored).kind
        torch.ones(THREADS_COME_UP, THREADS_COME_UP) @ torch.ones(THREADS_COME_UP, THREADS_COME_UP)
        choices: dict[str, Any] = {"dtype": getattr(torch, dtype)} if dtype else {}
        if quantize is not None:
            choices["quantization_config"] = SVDQConfig(**quantize)
        elif peer is not None:
            choices["quantization_config"] = PEERS[peer].config()
        self.before = memory_now()
        with watched() as peak:
            started = time.perf_counter()
            model = kind.from_pretrained(
                source.folder, use_safetensors=True, local_files_only=True, trust_remote_code=False, **choices
            )
            seconds = time.perf_counter() - started
        self.work = Workload(model.dequantize() if dequantize else model)
        return {
            "seconds": seconds,
            **(peak.memory - self.before)._asdict(),
            "kind": type(model).__name__,
            "parameters": number_of_weights(model),
            "writes": self.work.writes,
            "threads": torch.get_num_threads(),
        }

    def prefill(self, tokens: int) -> dict[str, Any]:
        """One forward pass: `tokens`, as many as the model has positions for, and `seconds`."""
        return self._workload.prefill(self._inputs(tokens))._asdict()

    def decode(self, prompt_tokens: int, new_tokens: int) -> dict[str, Any]:
        """New tokens, one by one: `tokens` and `seconds`; both None where the model writes none."""
        timed = self._workload.decode(self._inputs(prompt_tokens, new_tokens), new_tokens)
        return timed._asdict() if timed is not None else {"tokens": None, "seconds": None}

    def memory(self, prompt_tokens: int, new_tokens: int) -> dict[str, Any]:
        """The peaks, above the interpreter's own memory, while a prompt is read and answered."""
        inputs = self._inputs(prompt_tokens, new_tokens)
        with watched() as peak:
            self._workload.prefill(inputs)
            self._workload.decode(inputs, new_tokens)
        return (peak.memory - self.before)._asdict()

    def shares(self, prompt_tokens: int, new_tokens: int) -> dict[str, Any]:
        """The share of each kind of module in a forward pass (`prefill`) and in decoding (`decode`)."""
        inputs = self._inputs(prompt_tokens, new_tokens)
        with shared(self._workload.model) as shares:
            read = shares.of(self._workload.prefill(inputs).seconds)
            written = self._workload.decode(inputs, new_tokens, shares.begin)
        return {"prefill": read, "decode": None if written is None else shares.of(written.seconds)}

    def paths(self, tokens: list[int]) -> dict[str, Any]:
        """The paths that the quantized layers take (`KernelPath`), by shape."""
        model = self._workload.model
        return {"paths": [one.to_dict() for one in kernel_paths(model, tokens, model.dtype)]}

    @property
    def _workload(self) -> Workload:
        if self.work is None:
            raise ValueError("no model is loaded")
        return self.work

    def _inputs(self, tokens: int, new_tokens: int = 0) -> Any:
        """Inputs that leave room for new tokens, made once."""
        length = self._workload.longest(tokens, room=max(2, new_tokens))
        if length not in self.inputs:
            self.inputs[length] = self._workload.inputs(length)
        return self.inputs[length]


def answer(requests: TextIO, answers: TextIO) -> None:
    """Answer requests until there are no more.

    Args:
        requests: lines of JSON: `do`, the name of a method of `Worker`, and its arguments.
        answers: where a line of JSON goes for each: what the method returned, or `error`.
    """
    worker = Worker()
    for line in requests:
        request = json.loads(line)
        method: Callable[..., dict[str, Any]] = getattr(worker, request.pop("do"))
        try:
            told = method(**request)
        except Exception as error:
            text = " ".join(str(error).split())
            plain = isinstance(error, ValueError | OSError | ImportError)
            told = {"error": text if plain and text else f"{type(error).__name__}: {text}"}
        answers.write(json.dumps(told) + "\n")
        answers.flush()


def main() -> None:
    """Serve on standard input and output, which is kept for answers alone."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    answer(sys.stdin, answers)


if __name__ == "__main__":
    main()
