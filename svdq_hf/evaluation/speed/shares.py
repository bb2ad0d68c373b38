"""Shares of a model's time by kind of module, measured with hooks: what is ours, and what is not.

The time of a module counts without that of the modules inside it which have a kind of their own, so the kinds
sum up to the whole. Not here: the runs that are timed (`evaluation.speed.workload`).
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from svdq_hf.nn.embedding import SVDQEmbedding, TiedEmbedding
from svdq_hf.nn.experts import SVDQExperts
from svdq_hf.nn.linear import SVDQLinear

REST = "rest"
"""What belongs to no module with a kind: activations, sums, the loop of `generate`."""
KINDS: tuple[tuple[str, tuple[type, ...]], ...] = (
    ("embedding", (nn.Embedding, SVDQEmbedding, TiedEmbedding)),
    ("quantized layers", (SVDQLinear,)),
    ("quantized experts", (SVDQExperts,)),
    ("dense layers", (nn.Linear, Conv1D)),
    ("convolutions", (nn.Conv1d, nn.Conv2d, nn.Conv3d)),
)
"""Kinds by class; the first that fits counts."""
WORDS = {"Attention": "attention", "Norm": "norms"}
"""Kinds by a word in the name of the class, in the families' own modules."""


class Shares:
    """Seconds by kind, filled within `shared`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._open: list[list[float]] = []

    def begin(self) -> None:
        """Forget what was measured so far, of modules that are still running as well."""
        self.seconds.clear()
        now = time.perf_counter()
        self._open = [[now, 0.0] for _ in self._open]

    def enter(self) -> None:
        """A module of a kind begins."""
        self._open.append([time.perf_counter(), 0.0])

    def leave(self, kind: str) -> None:
        """The module that began last ends.

        Args:
            kind: of the module.
        """
        started, inside = self._open.pop()
        took = time.perf_counter() - started
        self.seconds[kind] = self.seconds.get(kind, 0.0) + took - inside
        if self._open:
            self._open[-1][1] += took

    def of(self, seconds: float) -> dict[str, float]:
        """The share of each kind in a time, the largest first, `REST` last.

        Args:
            seconds: of the whole run.
        """
        found = {kind: took / seconds for kind, took in self.seconds.items()}
        ordered = dict(sorted(found.items(), key=lambda one: -one[1]))
        return {**ordered, REST: max(0.0, 1 - sum(found.values()))}


@contextmanager
def shared(model: nn.Module) -> Iterator[Shares]:
    """Context manager: the seconds of each kind of module in its block.

    Args:
        model: the model that runs in it.
    """
    shares = Shares()
    hooks = []
    for module, kind in kinds(model).items():
        hooks.append(module.register_forward_pre_hook(lambda *_: shares.enter()))
        hooks.append(module.register_forward_hook(lambda *_, kind=kind: shares.leave(kind), always_call=True))
    try:
        yield shares
    finally:
        for hook in hooks:
            hook.remove()


def kinds(model: Any) -> dict[nn.Module, str]:
    """The modules that have a kind: the output head, layers by class, attention and norms by name.

    Args:
        model: of transformers.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    found = {module: _kind(module) for module in model.modules() if module is not model}
    if head is not None:
        found[head] = "head"
    return {module: kind for module, kind in found.items() if kind is not None}


def _kind(module: nn.Module) -> str | None:
    by_class = (kind for kind, classes in KINDS if isinstance(module, classes))
    name = type(module).__name__
    by_name = (kind for word, kind in WORDS.items() if word in name)
    return next(by_class, None) or next(by_name, None)
