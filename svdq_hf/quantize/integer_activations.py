"""Preparing a model for integer activations: rotated, so that rounding its activations costs little.

The model computes the same afterwards, in bases in which few axes carry what varies most; the config says
what single layers do with their inputs before they round them. Not here: the layers themselves
(`quantize.convert`), bases (`quantize.bases`).
"""

import re
from collections.abc import Container, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from svdq_hf.config import SVDQConfig
from svdq_hf.quantize.bases import bases_of, check_subspaces, seen_covariances, weight_covariances
from svdq_hf.quantize.convert import check_layer_inputs
from svdq_hf.quantize.module_calls import NotRotatable, logits_of, typical_tokens
from svdq_hf.quantize.residual_stream import ResidualStream, find_stream
from svdq_hf.quantize.rotate import fold_norms, rotate
from svdq_hf.quantize.selection import dense_weight, layers_to_convert
from svdq_hf.quantize.weight import check_weight

PROBES, CLOSE, ROUNDINGS = 15, 1e-3, 32
"""Tokens of which a rotated model's logits are compared; how much these may differ, relatively, or how many
roundings of the dtype. (Their median, since the logits of single tokens are noise in half precision.)"""


def prepare_activations(
    model: nn.Module, config: SVDQConfig, batches: Iterable[Any] | None = None
) -> SVDQConfig:
    """Rotate a model in place, and say in the config what its layers do with their inputs.

    Args:
        model: the dense model.
        config: with `activations`.
        batches: of which the bases are made; None: they are made of the weights.

    Returns:
        The config with `basis` and `layer_inputs`.

    Raises:
        ValueError: the model cannot be rotated (`NotRotatable`), a parameter is not finite, a subspace does
            not fit, or `basis` is "data" and there are no batches: nothing is changed then; the batches are
            of no use (`collect_inputs`): then the norms are folded, and the model computes what it did; or
            the rotated model computes something else: then it must be loaded again.
    """
    basis = config.basis or ("weights" if batches is None else "data")
    if basis == "data" and batches is None:
        raise ValueError("basis='data' needs batches: quantize_model(model, config, batches), --calibration")
    chosen = layers_to_convert(model, config)
    _check_values(model, chosen)
    stream, tokens = find_stream(model), typical_tokens(model, PROBES)
    before = logits_of(model, tokens)
    config = config.replace(basis=basis, layer_inputs=layer_inputs(model, stream, chosen))
    check_layer_inputs(chosen, config)
    check_subspaces(model, stream, config.subspace)
    fold_norms(model, stream)
    if basis == "data" and batches is not None:
        covariances = seen_covariances(model, stream, batches)
    else:
        covariances = weight_covariances(model, stream)
    rotate(model, stream, bases_of(covariances, config.subspace, config.seed))
    _check_same(model, tokens, before)
    return config


def _check_values(model: nn.Module, chosen: Mapping[str, nn.Module]) -> None:
    """Refuse a weight that cannot be quantized, or any parameter not finite: a rotation spreads it."""
    for name, layer in chosen.items():
        check_weight(name, dense_weight(layer))
    for name, one in model.named_parameters():
        pieces = torch.split(one.detach().reshape(-1), 2**24)  # no mask as large as an embedding
        if one.is_floating_point() and not all(piece.isfinite().all() for piece in pieces):
            raise ValueError(f"{name} has a NaN or an infinity: the checkpoint is damaged")


def _check_same(model: nn.Module, tokens: Tensor, before: Tensor) -> None:
    """Refuse a rotated model that does not compute what it did.

    Args:
        model: the rotated model.
        tokens: `[1, count]`.
        before: its logits on them before, `[count, classes]`.

    Raises:
        NotRotatable: they differ by more than rounding does.
    """
    apart = float(((logits_of(model, tokens) - before).norm(dim=1) / before.norm(dim=1)).median())
    roundings = [torch.finfo(one.dtype).eps for one in model.parameters() if one.is_floating_point()]
    allowed = max(CLOSE, ROUNDINGS * max(roundings))
    if not apart <= allowed:
        raise NotRotatable(
            f"{type(model).__name__} cannot be rotated: its logits differ by {apart:.2g} afterwards, where "
            f"rounding allows {allowed:.2g}; something reads its stream unseen. Load the model again: this "
            "one is changed"
        )


def layer_inputs(
    model: nn.Module, stream: ResidualStream, chosen: Container[str] | None = None
) -> dict[str, int | Literal["hadamard"]]:
    """What the layers that write to the stream do with their inputs, by the ends of their names.

    Args:
        model: the model.
        stream: what `find_stream` found.
        chosen: names of the layers that are quantized; None: all.

    Returns:
        The number of heads in the input, or "hadamard"; by full names where an end would say two things.
    """
    found: dict[str, int | Literal["hadamard"]] = {}
    for block in stream.blocks:
        if chosen is not None and block.writer not in chosen:
            continue
        weight = dense_weight(model.get_submodule(block.writer))
        found[block.writer] = "hadamard" if block.heads is None else weight.shape[1] // block.heads.size
    ends = {_end(name): value for name, value in found.items()}
    return ends if all(ends[_end(name)] == value for name, value in found.items()) else found


def _end(name: str) -> str:
    """A layer's name within its block.

    >>> _end("model.layers.11.mlp.down_proj")
    'mlp.down_proj'
    """
    return re.sub(r"^.*\.\d+\.", "", name)
