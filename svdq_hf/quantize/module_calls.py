"""Calls of a decoder's modules for a few tokens: what its embedding, linear layers and norms read and answer.

The tokens are of typical rows of the embedding: an empty one (padding has it) would tell nothing, and what a
model answers to the largest is noise in half precision. Not here: what the calls say of the model
(`quantize.residual_stream`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from svdq_hf.calibration.inputs import evaluating
from svdq_hf.quantize.code_inspection import is_linear


class NotRotatable(ValueError):
    """The model's stream cannot be rotated; the message says at which module, and why."""


@dataclass(frozen=True)
class Call:
    """One call of a module.

    Attributes:
        name: of the module.
        module: which was called.
        x: its input, `[..., in]`; of an embedding, ids.
        y: its output, `[..., out]`.
    """

    name: str
    module: nn.Module
    x: Tensor
    y: Tensor


def one_token(model: nn.Module) -> list[Call]:
    """The calls of a model's embedding, linear layers and norms for one token, in order.

    Args:
        model: the model; it is left as it was.

    Raises:
        NotRotatable: it has no input embedding, or does not run on tokens alone.
    """
    calls: list[Call] = []
    with _recorded(model, _embedding(model), calls):
        _run(model, typical_tokens(model, 1))
    return calls


def typical_tokens(model: nn.Module, count: int) -> Tensor:
    """The tokens whose rows of the embedding are of middling size among those that are not zero.

    Args:
        model: the model.
        count: how many tokens; fewer where the embedding has fewer.

    Returns:
        `[1, count]`, int64.

    Raises:
        NotRotatable: the model has no input embedding.
    """
    table = _embedding(model).weight.detach()
    sizes = torch.cat([rows.float().norm(dim=1) for rows in torch.split(table, 4096)])
    order = sizes.argsort()[int((sizes == 0).sum()) :]
    start = max(0, (len(order) - count) // 2)
    return order[start : start + count][None] if len(order) else order.new_zeros(1, 1)


def logits_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """What a model answers, float32.

    Args:
        model: the model; it is left as it was.
        tokens: `[1, count]`, int64.

    Returns:
        `[answers, classes]`: of a decoder's head, one for each token.

    Raises:
        NotRotatable: it does not run on tokens alone, or answers with no tensor.
    """
    answer = _run(model, tokens)
    logits = answer if isinstance(answer, Tensor) else answer[0]
    if not isinstance(logits, Tensor):
        raise NotRotatable(f"{type(model).__name__} answers with no tensor of logits")
    return logits.float().flatten(0, -2)


def _run(model: nn.Module, tokens: Tensor) -> Any:
    try:
        with evaluating(model):
            return model(input_ids=tokens, use_cache=False)
    except (TypeError, ValueError) as error:  # it wants more than tokens, or has no cache: no decoder
        kind = type(model).__name__
        raise NotRotatable(f"{kind} does not run as a decoder on one token: {error}") from error


def _embedding(model: Any) -> nn.Embedding:
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    if not isinstance(embedding, nn.Embedding):
        raise NotRotatable(f"{type(model).__name__} has no input embedding, where a stream would start")
    return embedding


@contextmanager
def _recorded(model: nn.Module, embedding: nn.Module, calls: list[Call]) -> Iterator[None]:
    """Context manager: calls of the model's embedding, linear layers and norms are appended to `calls`."""

    def watch(name: str, module: nn.Module) -> Any:
        def note(_: nn.Module, given: tuple[Any, ...], y: Any) -> None:
            if given and isinstance(y, Tensor):
                calls.append(Call(name, module, given[0], y))

        return module.register_forward_hook(note)

    watched = [
        watch(name, module)
        for name, module in model.named_modules()
        if module is embedding or is_linear(module) or _may_be_norm(module)
    ]
    try:
        yield
    finally:
        for hook in watched:
            hook.remove()


def _may_be_norm(module: nn.Module) -> bool:
    own = dict(module.named_parameters(recurse=False))
    return bool(own) and all(one.ndim == 1 for one in own.values()) and not list(module.children())
