"""GGUF files of one model by svdq and by llama.cpp, both without data: size, KL and change of loss.

    pip install -e '.[gguf]' llama-cpp-python
    python examples/bench_gguf.py OUT F16.gguf TEXT [TEXT ...] [--tokens 4096]   # a Markdown table

All files are made of F16.gguf, in the folder OUT (those that are there are taken as they are), and run by
llama.cpp on the same windows of each text. KL is the mean over all tokens of KL(F16 || file), in nats; the
loss is the mean of the windows' next tokens; "same" is how often the likeliest next token is the same. A text
is a file of text, or of lines of JSON with "text". IQ4_NL, Q4_0, IQ4_XS and Q4_K_M are llama.cpp's own, by
its `llama_model_quantize`, without an importance matrix.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from svdq_hf import quantize_gguf

Logits = NDArray[np.float32]

WINDOW = 512
"""Tokens that the model sees at a time."""

OURS: dict[str, dict[str, bool]] = {
    "svdq": {},
    "svdq, no column scales": {"column_scale": False},
    "svdq, error feedback": {"error_feedback": True},
}
THEIRS = ("IQ4_NL", "IQ4_XS", "Q4_0", "Q4_K_M")
THREADS = 1
"""More wait for one another in busy loops, which is slow where other work is done at the same time."""


class Row(NamedTuple):
    """What a file costs on one text."""

    kl: float
    loss: float
    same: float


def make(name: str, dense: Path, out: Path) -> Path:
    """The file of a method, made where it is not there."""
    path = out / f"{dense.stem}-{name.replace(', ', '-').replace(' ', '-')}.gguf"
    if not path.exists():
        if name in OURS:
            quantize_gguf(dense, path, **OURS[name])
        else:
            _by_llama_cpp(name, dense, path)
    return path


def _by_llama_cpp(name: str, dense: Path, path: Path) -> None:
    import llama_cpp

    chosen = llama_cpp.llama_model_quantize_default_params()
    chosen.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{name}")
    chosen.nthread = THREADS
    if llama_cpp.llama_model_quantize(str(dense).encode(), str(path).encode(), chosen) != 0:
        raise RuntimeError(f"llama.cpp could not write {path}")


def read_text(path: Path) -> str:
    """A text, or the texts of lines of JSON, one after the other."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".jsonl":
        return text
    return "\n\n".join(json.loads(line)["text"] for line in text.splitlines())


class Model:
    """A GGUF file in llama.cpp."""

    def __init__(self, path: Path) -> None:
        from llama_cpp import Llama

        sizes = {"n_ctx": WINDOW, "n_batch": WINDOW, "n_ubatch": WINDOW, "n_threads": THREADS}
        self.model: Any = Llama(str(path), logits_all=True, verbose=False, n_threads_batch=THREADS, **sizes)

    def windows(self, text: str, tokens: int) -> list[list[int]]:
        """The first tokens of a text in windows; each begins with <bos> where the model's texts did."""
        first = [self.model.token_bos()] if self._begins() else []
        found = self.model.tokenize(text[: 8 * tokens].encode(), add_bos=False)[:tokens]
        step = WINDOW - len(first)
        return [first + found[start : start + step] for start in range(0, len(found) - step + 1, step)]

    def _begins(self) -> bool:
        return self.model.metadata.get("tokenizer.ggml.add_bos_token") == "true"

    def logits(self, windows: list[list[int]]) -> Iterator[Logits]:
        """Log probabilities `[window, vocabulary]` of each window."""
        for window in windows:
            self.model.reset()
            self.model.eval(window)
            yield log_softmax(self.model.scores[: len(window)])


def log_softmax(logits: Logits) -> Logits:
    """Log probabilities of logits `[tokens, vocabulary]`."""
    shifted = logits - logits.max(1, keepdims=True)
    found: Logits = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return found


def loss(logs: Logits, window: list[int]) -> float:
    """Mean negative log probability of each window's next tokens."""
    return -float(logs[np.arange(len(window) - 1), window[1:]].mean())


def compare(dense: list[Logits], found: Iterator[Logits], windows: list[list[int]]) -> Row:
    """A file's rows against those of the dense file.

    Args:
        dense: log probabilities of each window, float16.
        found: those of the file.
        windows: the tokens.
    """
    rows = []
    for window, expected, logs in zip(windows, dense, found, strict=True):
        right = expected.astype(np.float32)
        kl = float((np.exp(right) * (right - logs)).sum(1).mean())
        same = float((right.argmax(1) == logs.argmax(1)).mean())
        rows.append(Row(kl, loss(logs, window) - loss(right, window), same))
    return Row(*(float(np.mean(column)) for column in zip(*rows, strict=True)))


def bench(dense: Path, out: Path, texts: list[Path], tokens: int, names: list[str]) -> None:
    """Print the table of one model."""
    model = Model(dense)
    windows = {text.stem: model.windows(read_text(text), tokens) for text in texts}
    right = {name: [one.astype(np.float16) for one in model.logits(parts)] for name, parts in windows.items()}
    del model
    losses = {name: np.mean(list(map(loss, right[name], parts))) for name, parts in windows.items()}
    told = [f"{name}: loss {found:.3f}" for name, found in losses.items()]
    print(f"{dense.stem}, F16, {dense.stat().st_size / 1e6:.1f} MB; {'; '.join(told)}\n")
    titles = [f"{part}, {name}" for name in windows for part in ("KL", "loss", "same")]
    print(f"| file | MB | {' | '.join(titles)} |\n|{'---|' * (2 + len(titles))}")
    for name in names:
        path = make(name, dense, out)
        quantized = Model(path)
        rows = [compare(right[text], quantized.logits(parts), parts) for text, parts in windows.items()]
        cells = [f"{row.kl:.4f} | {row.loss:+.4f} | {row.same:.1%}" for row in rows]
        print(f"| {name} | {path.stat().st_size / 1e6:.1f} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="folder for the files")
    parser.add_argument("dense", type=Path, help="GGUF file of F16")
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--only", nargs="+", choices=[*OURS, *THEIRS], default=[*OURS, *THEIRS])
    given = parser.parse_args()
    given.out.mkdir(exist_ok=True)
    bench(given.dense, given.out, given.texts, given.tokens, given.only)


if __name__ == "__main__":
    main()
