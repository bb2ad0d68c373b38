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

import svdq_hf  # noqa: F401  # registers the method
from svdq_hf.checkpoint.source import Source
from svdq_hf.evaluation.speed.memory import Memory, memory_now, watched
from svdq_hf.evaluation.speed.workload import Workload

THREADS_COME_UP = 256
"""Rows of a product that starts the threads of torch, whose stacks are not the model's memory."""


class Worker:
    """The model of this process, and the answers to requests."""

    def __init__(self) -> None:
        self.work: Workload | None = None
        self.before = Memory(None, None)
        self.inputs: dict[int, Any] = {}

    def load(self, folder: str, dtype: str | None = None, **choices: Any) -> dict[str, Any]:
        """Load a model, watched.

        Args:
            folder: of the model, dense or quantized.
            dtype: of what is dense, such as "bfloat16"; None: as stored.
            **choices: further arguments of `from_pretrained`.

        Returns:
            `seconds`, and `resident` and `anonymous`, the peaks above the interpreter's own memory.
        """
        source = Source.resolve(folder)
        kind = Source.resolve(source, packed="quantization_config" in source.stored).kind
        torch.ones(THREADS_COME_UP, THREADS_COME_UP) @ torch.ones(THREADS_COME_UP, THREADS_COME_UP)
        choices |= {"dtype": getattr(torch, dtype)} if dtype else {}
        self.before = memory_now()
        with watched() as peak:
            started = time.perf_counter()
            model = kind.from_pretrained(
                source.folder, use_safetensors=True, local_files_only=True, trust_remote_code=False, **choices
            )
            seconds = time.perf_counter() - started
        self.work = Workload(model)
        return {"seconds": seconds, **(peak.memory - self.before)._asdict()}

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
