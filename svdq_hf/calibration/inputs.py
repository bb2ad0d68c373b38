"""Input statistics: what a few batches tell about the inputs of each layer, for scores that need data.

One pass over the batches with forward hooks. Per layer it keeps the sum of squares of each input
(float64) and, only where a score needs it, the Gram matrix of the inputs in float32: `4 in^2` bytes a layer,
freed as its layer is quantized, and off by at most (calls + 1) * 2**-24 of its diagonal from accumulating.
Padding tokens, which a batch's mask hides, are left out. Not here: scores (`core.saliency`), and batches made
without data (`calibration.synthetic`).
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.utils import logging as hf_logging


@dataclass
class InputStatistics:
    """Sums over all tokens X `[tokens, in]` that one layer received.

    Attributes:
        tokens: how many there were.
        square_sum: diagonal of `X^T X`, `[in]`, float64; None before the first token.
        gram: `X^T X`, `[in, in]`, float32; None where it was not collected.
        sensitivity: PQI of the layer's weights (`calibration.pqi`), or what ReQuant makes of it, `[out, in]`,
            float32; None likewise.
    """

    tokens: int = 0
    square_sum: Tensor | None = None
    gram: Tensor | None = field(default=None, repr=False)
    sensitivity: Tensor | None = field(default=None, repr=False)

    def add(self, tokens: Tensor, with_gram: bool) -> None:
        """Add the inputs of one call.

        Args:
            tokens: `[tokens, in]`, of any float dtype.
            with_gram: whether the Gram matrix is summed up, too.
        """
        with torch.autocast(tokens.device.type, enabled=False):
            self._add(tokens.float(), with_gram)

    def _add(self, tokens: Tensor, with_gram: bool) -> None:
        squares = tokens.double().square().sum(0)
        self.tokens += tokens.shape[0]
        self.square_sum = squares if self.square_sum is None else self.square_sum + squares
        if with_gram:
            gram = tokens.T @ tokens
            self.gram = gram if self.gram is None else self.gram.add_(gram)

    @property
    def norm(self) -> Tensor:
        """Euclidean norm of each input over all tokens, `[in]`, float32.

        Raises:
            ValueError: no token was added.
        """
        if self.square_sum is None:
            raise ValueError("no token was seen")
        return self.square_sum.sqrt().float()


def collect_inputs(
    model: nn.Module,
    layers: Mapping[str, nn.Module | list[nn.Module]],
    batches: Iterable[Any],
    *,
    gram: bool = False,
) -> dict[str, InputStatistics]:
    """Run a model on batches and collect statistics of the inputs of some of its layers.

    The model runs without gradients and in evaluation mode, and is left as it was.

    Args:
        model: the model.
        layers: the layers to watch, by name; of a list of layers the inputs are summed up together.
        batches: each what the model takes: a mapping of keyword arguments, a tuple of positional ones, or
            one tensor.
        gram: whether Gram matrices `[in, in]` are collected.

    Returns:
        Statistics by the layer's name.

    Raises:
        TypeError: `batches` cannot be iterated over.
        ValueError: no batch, one that holds no tensor, a layer that never ran, or inputs that are NaN or
            infinite.

    >>> layer = nn.Linear(2, 1)
    >>> seen = collect_inputs(layer, {"": layer}, [torch.tensor([[3.0, 0.0], [4.0, 1.0]])])
    >>> seen[""].tokens, seen[""].norm.tolist()
    (2, [5.0, 1.0])
    """
    _check_batches(batches)
    seen = {name: InputStatistics() for name in layers}
    masks: list[Tensor] = []
    hooks = [
        layer.register_forward_pre_hook(_Recorder(name, seen[name], masks, gram))
        for name, named in layers.items()
        for layer in (named if isinstance(named, list) else [named])
    ]
    try:
        with evaluating(model):
            for batch in hf_logging.tqdm(batches, desc="Calibrating"):
                masks[:] = masks_of(batch)
                call(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    for name, statistics in seen.items():
        if statistics.square_sum is None or statistics.tokens == 0:
            raise ValueError(f"{name}: no batch reached this layer; pass batches that run the whole model")
        if not torch.isfinite(statistics.square_sum).all():
            raise ValueError(f"{name}: its inputs have a NaN or an infinity")
    return seen


@dataclass
class _Recorder:
    """A forward hook that counts the inputs of one layer."""

    name: str
    statistics: InputStatistics
    masks: list[Tensor]
    gram: bool

    def __call__(self, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        x = arguments[0].detach()
        tokens = x.reshape(-1, x.shape[-1])
        mask = mask_of(self.name, tuple(x.shape[:-1]), self.masks)
        self.statistics.add(tokens if mask is None else tokens[mask.reshape(-1).to(x.device)], self.gram)


def masks_of(batch: Any) -> list[Tensor]:
    """The batch's masks `[batch, tokens]`, True where a token counts: encoder's, then decoder's."""
    if not isinstance(batch, Mapping):
        return []
    found = (batch.get("attention_mask"), batch.get("decoder_attention_mask"))
    return [mask.bool() for mask in found if isinstance(mask, Tensor) and mask.ndim == 2]


def mask_of(name: str, shape: tuple[int, ...], masks: list[Tensor]) -> Tensor | None:
    """The mask that fits inputs of `shape`: `[batch, tokens]`, or both flattened to one dimension.

    Where encoder and decoder have the same length, a decoder's layer takes the decoder's mask, unless
    it reads the encoder (keys and values of its cross attention).
    """
    fitting = [mask for mask in masks if shape in (tuple(mask.shape), (mask.numel(),))]
    if len(fitting) < 2:
        return fitting[0] if fitting else None
    return fitting[1] if "decoder" in name and not _reads_encoder(name) else fitting[0]


def _reads_encoder(name: str) -> bool:
    """Whether a decoder's layer, by its name, makes the keys or values of a cross attention."""
    path, _, leaf = name.partition("decoder")[2].lower().rpartition(".")
    return ("enc" in path or "cross" in path) and leaf in ("k", "v", "k_proj", "v_proj", "key", "value")


def call(model: nn.Module, batch: Any) -> Any:
    """Run a model on one batch.

    Args:
        model: the model.
        batch: a mapping of keyword arguments, a tuple or list of positional ones, or one tensor.

    Returns:
        The model's output.

    Raises:
        ValueError: the batch holds plain numbers or texts where a model takes tensors.
    """
    if isinstance(batch, str):
        raise ValueError(f"batch {batch[:20]!r} is a text; give what the model takes: tokenizer(text, ...)")
    if isinstance(batch, Mapping):
        for name in TENSORS & batch.keys():
            if batch[name] is not None and _is_plain(batch[name]):
                kind = type(batch[name]).__name__
                raise ValueError(f"a batch's {name!r} is a {kind}, not a tensor: {_REMEDY}")
        return model(**batch)
    if _is_plain(batch) or (isinstance(batch, tuple | list) and all(map(_is_plain, batch))):
        shown = repr(batch)
        shown = shown if len(shown) <= 40 else f"{shown[:40]}..."
        raise ValueError(f"batch {shown} ({type(batch).__name__}) has no tensor: {_REMEDY}")
    if isinstance(batch, tuple | list):
        return model(*batch)
    return model(batch)


_REMEDY = (
    'give what the model takes, tokenizer(texts, padding=True, return_tensors="pt") or torch.tensor(ids)'
)

TENSORS = {
    "input_ids", "inputs_embeds", "attention_mask", "token_type_ids", "decoder_input_ids",
    "decoder_attention_mask", "pixel_values", "input_values", "input_features",
}  # fmt: skip
"""Keyword arguments of transformers' models that are always tensors."""


def writes(model: nn.Module) -> bool:
    """Whether a model is a causal one that can continue a text, and learns from any text.

    Args:
        model: a transformers model, or any other.
    """
    can, config = getattr(model, "can_generate", None), getattr(model, "config", None)
    return callable(can) and bool(can()) and not getattr(config, "is_encoder_decoder", False)


def _is_plain(value: Any) -> bool:
    """Whether a value is made of numbers or texts, alone or in lists or arrays, and not of tensors."""
    while isinstance(value, list | tuple | set) and value:
        value = next(iter(value))
    plain = (int, float, str, list, tuple, set, np.ndarray, np.generic)
    return value is None or isinstance(value, plain)


def _check_batches(batches: Any) -> None:
    if isinstance(batches, Mapping | Tensor | str):
        raise ValueError("batches must be a list of batches; put a single one into a list: [batch]")
    if not isinstance(batches, Iterable):
        raise TypeError(f"batches={batches!r}: must be a list of batches, each what the model takes")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Context manager: the model in evaluation mode and without gradients; afterwards each module as it was.

    Args:
        model: the model; its modules may be in different modes.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
