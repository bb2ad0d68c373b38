"""The near end of a process that holds one model (`evaluation.speed.worker`): it is asked, and answers.

Imports neither torch nor transformers: the model lives in the other process alone. Not here: what is asked.
"""

import json
import os
import subprocess
import sys
import tempfile
from types import TracebackType
from typing import Any

WORKER = "svdq_hf.evaluation.speed.worker"
KILLED = -9
"""Exit code of a process that got SIGKILL, as Linux sends it where memory runs out."""


class ModelProcess:
    """A fresh Python process for one model, to be used in a `with` block, which ends it.

    Args:
        threads: of torch there; None: as many as a process started by hand would have.
    """

    def __init__(self, threads: int | None = None) -> None:
        counted = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", WORKER],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
            text=True, env={**os.environ, **counted},
        )  # fmt: skip

    @property
    def pid(self) -> int:
        """The process' number."""
        return self._process.pid

    def __enter__(self) -> "ModelProcess":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """The answer to one request.

        Args:
            do: the name of a method of `Worker`.
            **arguments: its arguments, in types that JSON has.

        Raises:
            ValueError: the request failed there, or the process ended: why, in one line.
        """
        if self._process.stdin is None or self._process.stdout is None:
            raise ValueError("the process has no pipes")
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise ValueError(self._ended())
        told: dict[str, Any] = json.loads(line)
        if "error" in told:
            raise ValueError(told["error"])
        return told

    def end(self) -> None:
        """End the process, whatever it does."""
        if self._process.poll() is None:
            self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        self._process.wait()
        self._errors.close()

    def _ended(self) -> str:
        """Why the process ended, in one line."""
        code = self._process.wait()
        if code == KILLED:
            return "the process that holds the model was killed, most often since memory ran out"
        self._errors.seek(0)
        lines = self._errors.read().split("\n")
        told = [line.strip() for line in lines if line.strip()]
        return f"the process that holds the model ended with {code}: {told[-1] if told else 'no message'}"
