"""Checks after a quantized model was loaded: every stored part is there, and parts from files are sound.

Not here: checks before loading (`integrations.transformers.header_checks`).
"""

from collections.abc import Mapping

from torch import Tensor, nn

from svdq_hf.format.checks import check_parts
from svdq_hf.format.parts import Scheme
from svdq_hf.integrations.transformers.checkpoint_headers import REMEDY
from svdq_hf.nn.experts import SVDQExperts
from svdq_hf.nn.inventory import svdq_experts, svdq_layers
from svdq_hf.quantize.selection import check_biases


def check_filled(model: nn.Module, remedy: str) -> None:
    """Refuse a model with a quantized layer that was not filled (a state dict has no headers to check).

    A bias counts: transformers would initialize a dense layer's to zero, but leaves that of a class which it
    does not know uninitialized.

    Args:
        model: the loaded model.
        remedy: end of the error message.

    Raises:
        ValueError: it names the layer and what is missing, or the bias that has a NaN.
    """
    for name, layer in svdq_layers(model):
        _check_here(name, layer, [*layer.parts(), *([] if layer.bias is None else ["bias"])], remedy)
    for name, experts in svdq_experts(model):
        keys = [*experts.parts(), *dict(experts.named_parameters(recurse=False))]
        _check_here(name, experts, keys, remedy)


def _check_here(name: str, layer: nn.Module, keys: list[str], remedy: str) -> None:
    stored = {key: getattr(layer, key) for key in keys}
    if _is_on_disk(stored):
        return
    missing = [key for key, tensor in stored.items() if not getattr(tensor, "_is_hf_initialized", False)]
    if missing:
        raise ValueError(f"{name}: {', '.join(missing)} is missing. {remedy}")
    check_biases(name, layer)


def _is_on_disk(parts: Mapping[str, Tensor]) -> bool:
    """Whether tensors are offloaded: read one by one when the layer runs."""
    return any(tensor.is_meta for tensor in parts.values())


def check_values(model: nn.Module) -> None:
    """Refuse a model with a quantized layer whose stored values are invalid.

    Args:
        model: the loaded model.

    Raises:
        ValueError: see `check_parts`; it names the layer.
    """
    for name, layer in svdq_layers(model):
        if not _is_on_disk(layer.parts()):
            _check_layer(name, layer.parts(), layer.in_features, layer.scheme)
    for name, experts in svdq_experts(model):
        if not _is_on_disk(experts.parts()):
            _check_experts(name, experts)


def _check_layer(name: str, parts: Mapping[str, Tensor], in_features: int, scheme: Scheme) -> None:
    try:
        check_parts(parts, in_features, scheme)
    except ValueError as error:
        raise ValueError(f"{name}: {error}. {REMEDY}") from error


def _check_experts(name: str, experts: SVDQExperts) -> None:
    for matrix, (count, _, in_features) in experts.stacks.items():
        stack = experts.stack(matrix)
        for one in range(count):
            parts = {part: tensor[one] for part, tensor in stack.items()}
            _check_layer(f"{name}.{matrix}, expert {one}", parts, in_features, experts.scheme)
