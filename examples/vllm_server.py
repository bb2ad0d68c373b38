"""A vLLM server as a process of its own, in an environment of its own: started, asked over HTTP, stopped.

    export SVDQ_VLLM_PYTHON=/path/to/vllm's/environment/bin/python
    python examples/vllm_server.py FOLDER "The capital of France is"

docs/vllm.md says how that environment is made. bench_vllm.py and the tests ask their servers through this
class; prompts and answers are texts, or token ids, which need no tokenizer to be compared.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

PYTHON = "SVDQ_VLLM_PYTHON"
"""The environment variable that names the Python of vLLM's environment."""

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
LEFT_OUT = ("PYTHONPATH", "OMP_NUM_THREADS")
"""What belongs to the environment of whoever starts it."""


def environment(**more: str) -> dict[str, str]:
    """The environment variables of a program that runs vLLM."""
    kept = {name: value for name, value in os.environ.items() if name not in LEFT_OUT}
    return {**kept, **ENVIRONMENT, **more}


class VllmServer:
    """A server of one model on 127.0.0.1; use it in a `with` block.

    Args:
        folder: of the model.
        *options: of `vllm serve`.
        wait: seconds until it must answer.
    """

    def __init__(self, folder: Path | str, *options: str, wait: float = 500) -> None:
        self.folder, self.options, self.wait = str(folder), options, wait
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]

    def __enter__(self) -> "VllmServer":
        self.log = tempfile.TemporaryFile("w+")
        command = [os.environ[PYTHON], "-m", "vllm.entrypoints.openai.api_server", "--model", self.folder]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--served-model-name", "model"]
        self.process = subprocess.Popen(
            [*command, *self.options], env=environment(), stdout=self.log, stderr=self.log,
            start_new_session=True,
        )  # fmt: skip
        end = time.monotonic() + self.wait
        while not self.answers():
            if self.process.poll() is not None or time.monotonic() > end:
                self.stop()
                told = self.told()
                self.log.close()
                raise RuntimeError(f"the server did not start:\n{told[-4000:]}")
            time.sleep(0.5)
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()
        self.log.close()

    def answers(self) -> bool:
        """Whether the server is there."""
        try:
            with self.open("health"):
                return True
        except OSError:
            return False

    def told(self) -> str:
        """What the server has printed."""
        self.log.seek(0)
        return self.log.read()

    def stop(self) -> int:
        """Ask it to end, and kill its processes where it does not; the exit status."""
        self.process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(60)
        with suppress(ProcessLookupError):  # none of its processes is left, as should be
            os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.wait()

    def open(self, path: str, asked: dict[str, Any] | None = None) -> HTTPResponse:
        """The open answer to a request."""
        body = None if asked is None else json.dumps(asked).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/{path}", body, headers)
        return urllib.request.urlopen(request, timeout=300)

    def complete(self, prompt: str | list[int], tokens: int, **choices: Any) -> dict[str, Any]:
        """The greedy answer: `text`, `token_ids` and what else the server tells of it."""
        with self.open("v1/completions", asked(prompt, tokens, **choices)) as answer:
            return json.load(answer)["choices"][0]

    def stream(self, prompt: str | list[int], tokens: int) -> Iterator[dict[str, Any]]:
        """The greedy answer piece by piece; closing the iterator closes the connection."""
        with self.open("v1/completions", asked(prompt, tokens, stream=True)) as answer:
            for line in answer:
                piece = line.decode().removeprefix("data: ").strip()
                if piece == "[DONE]":
                    return
                if piece:
                    yield json.loads(piece)["choices"][0]

    def metric(self, name: str) -> float:
        """The sum of a metric that the server counts, by its name there."""
        with self.open("metrics") as told:
            lines = [line.decode() for line in told]
        return sum(float(line.split()[-1]) for line in lines if line.startswith(f"{name}{{"))


def asked(prompt: str | list[int], tokens: int, **choices: Any) -> dict[str, Any]:
    """A request of vLLM's OpenAI-compatible API for a greedy answer of exactly so many tokens."""
    fixed = {"model": "model", "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    return {**fixed, "prompt": prompt, "max_tokens": tokens, **choices}


def main() -> None:
    """Start a server, ask it once, stop it."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # leaves the block, which stops the server
    folder, prompt, *options = sys.argv[1:]
    with VllmServer(folder, *options) as server:
        print(prompt + server.complete(prompt, 24)["text"])


if __name__ == "__main__":
    main()
