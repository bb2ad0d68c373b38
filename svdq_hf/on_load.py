"""While a model loads: each dense tensor becomes stored parts; and when it has loaded, is all of it there?

Like `quantizer`, this file touches transformers' internals (5.20 to 5.24).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps

from svdq_hf.checks import check_parts
from svdq_hf.config import SVDQConfig
from svdq_hf.convert import svdq_layers
from svdq_hf.decompose import Scheme
from svdq_hf.experts import SVDQExperts, stacks_of, svdq_experts
from svdq_hf.linear import SVDQLinear
from svdq_hf.loading import REMEDY, Checkpoint
from svdq_hf.names import Stored
from svdq_hf.weight import quantize_stack, quantize_weight


class SVDQQuantize(ConversionOps):  # type: ignore[misc]
    """A dense tensor, `layer.weight` or the experts' `gate_up_proj`, becomes the stored parts of it."""

    def __init__(self, config: SVDQConfig, failures: list[ValueError]) -> None:
        self.config, self.failures = config, failures

    def convert(
        self, input_dict: dict[str, Any], *, model: PreTrainedModel, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Quantize those of `input_dict` (full name -> tensor, or list of one) that need it.

        An error raised here would be reduced to a line in transformers' log, so it goes into `failures`, and
        the quantizer raises it when loading ends.
        """
        converted: dict[str, Tensor] = {}
        for name in list(input_dict):
            value = input_dict.pop(name)  # let go of the dense weight as soon as it is quantized
            dense = value[0] if isinstance(value, list) else value
            layer = owner_of(model, name)
            converted.update({name: dense} if layer is None else self._quantize(name, layer, dense))
        return converted

    def _quantize(self, key: str, layer: SVDQLinear | SVDQExperts, dense: Tensor) -> dict[str, Tensor]:
        if isinstance(layer, SVDQLinear):
            stored, transposed = Stored(key.removesuffix(".weight"), layer.shape), layer.transposed
        else:
            stored, transposed = Stored(key, layer.stacks[_leaf(key)]), layer.layout.transposed
        try:
            _check_shape(stored, dense, transposed=transposed)
            if isinstance(layer, SVDQLinear):
                weight = dense.T.contiguous() if transposed else dense
                parts, layer.facts = quantize_weight(weight, self.config, stored.name)
            else:
                parts, layer.facts[_leaf(key)] = quantize_stack(
                    dense, self.config, stored.name, transposed=transposed
                )
        except ValueError as error:
            self.failures.append(error)
            specs = stored.specs(layer.scheme)
            parts = {part: torch.empty(spec.shape, dtype=spec.dtype) for part, spec in specs.items()}
        return {stored.key(part): tensor for part, tensor in parts.items()}


def _check_shape(stored: Stored, dense: Tensor, *, transposed: bool) -> None:
    expected = list(stored.dense_shape(transposed=transposed))
    if list(dense.shape) != expected:
        raise ValueError(
            f"could not quantize {stored.name}: the checkpoint's weight is {list(dense.shape)}, "
            f"the model's config says {expected}"
        )


def _leaf(key: str) -> str:
    return key.rpartition(".")[2]


def owner_of(model: PreTrainedModel, param_name: str) -> SVDQLinear | SVDQExperts | None:
    """The quantized layer that the dense tensor `param_name` is a weight of, if there is one."""
    path, _, leaf = param_name.rpartition(".")
    module = model.get_submodule(path)
    if isinstance(module, SVDQExperts):
        return module if leaf in module.stacks else None
    return module if isinstance(module, SVDQLinear) and leaf == "weight" else None


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
