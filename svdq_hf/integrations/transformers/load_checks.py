"""Checks after a quantized model was loaded: every stored part is there, and sound."""

from collections.abc import Mapping

from torch import Tensor, nn

from svdq_hf.format.checks import check_parts
from svdq_hf.format.parts import Scheme
from svdq_hf.integrations.transformers.checkpoint_headers import REMEDY, Checkpoint
from svdq_hf.integrations.transformers.quantize_op import _leaf
from svdq_hf.nn.expert_layouts import stacks_of
from svdq_hf.nn.experts import SVDQExperts
from svdq_hf.nn.inventory import svdq_experts, svdq_layers


def loaded_exactly(chosen: Mapping[str, nn.Module], checkpoint: Checkpoint) -> set[str]:
    """Weights of experts that the loader does not round anyway: an FP32 copy of all of a layer is large."""
    return {
        stored.key("weight")
        for name, module in chosen.items()
        for stored in stacks_of(name, module)
        if (entry := checkpoint.entries.get(stored.key("weight"))) is not None
        and entry.dtype == getattr(module, _leaf(stored.name)).dtype
    }


def check_loaded(model: nn.Module, remedy: str) -> None:
    """Refuse a model of which a quantized layer was not filled, or with nonsense.

    A bias counts: transformers, which would start a dense layer's at zero, leaves that of a class which it
    does not know as memory happens to be.

    Raises:
        ValueError: it names the layer.
    """
    for name, layer in svdq_layers(model):
        bias = [] if layer.bias is None else ["bias"]
        if _is_here(name, layer, [*layer.parts(), *bias], remedy):
            _check_values(name, layer.parts(), layer.in_features, layer.scheme)
    for name, experts in svdq_experts(model):
        keys = [*experts.parts(), *dict(experts.named_parameters(recurse=False))]
        if _is_here(name, experts, keys, remedy):
            _check_experts(name, experts)


def _is_here(name: str, layer: nn.Module, keys: list[str], remedy: str) -> bool:
    """Refuse a layer that was not filled (a state dict has no headers to check); False: it is on disk."""
    stored = {key: getattr(layer, key) for key in keys}
    if any(tensor.is_meta for tensor in stored.values()):
        return False  # its tensors are read, one by one, when it runs
    missing = [key for key, tensor in stored.items() if not getattr(tensor, "_is_hf_initialized", False)]
    if missing:
        raise ValueError(f"{name}: {', '.join(missing)} is missing. {remedy}")
    return True


def _check_values(name: str, parts: Mapping[str, Tensor], in_features: int, scheme: Scheme) -> None:
    """Refuse a layer that was filled with nonsense."""
    try:
        check_parts(parts, in_features, scheme)
    except ValueError as error:
        raise ValueError(f"{name}: {error}. {REMEDY}") from error


def _check_experts(name: str, experts: SVDQExperts) -> None:
    for matrix, (count, _, in_features) in experts.stacks.items():
        stack = experts.stack(matrix)
        for one in range(count):
            parts = {part: tensor[one] for part, tensor in stack.items()}
            _check_values(f"{name}.{matrix}, expert {one}", parts, in_features, experts.scheme)
