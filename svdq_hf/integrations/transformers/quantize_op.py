"""SVDQQuantize: the load-time conversion (transformers' `ConversionOps`) of a dense tensor to stored parts.

Touches transformers' internals (5.20 to 5.24). Not here: which tensors are converted
(`integrations.transformers.load_dense`).
"""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps

from svdq_hf.config import SVDQConfig
from svdq_hf.format.names import WeightName
from svdq_hf.integrations.transformers.inference_mode import trainable_tensors
from svdq_hf.integrations.transformers.load_progress import LoadProgress
from svdq_hf.nn.experts import SVDQExperts
from svdq_hf.nn.linear import SVDQLinear
from svdq_hf.quantize.weight import quantize_stack, quantize_weight


class SVDQQuantize(ConversionOps):  # type: ignore[misc]
    """Conversion of a dense tensor (`layer.weight`, or the experts' `gate_up_proj`) to its stored parts.

    Args:
        config: how the model is quantized.
        failures: errors are appended here instead of being raised.
        progress: is told of each weight.
    """

    def __init__(self, config: SVDQConfig, failures: list[ValueError], progress: LoadProgress) -> None:
        self.config, self.failures, self.progress = config, failures, progress

    def convert(
        self, input_dict: dict[str, Any], *, model: PreTrainedModel, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Quantize those tensors that are weights of quantized layers.

        An error raised here would be reduced to a line in transformers' log, so it goes into `failures`, and
        `DenseLoad.finish` raises it when loading ends.

        Args:
            input_dict: by full name, a tensor `[out, in]` (experts: `[experts, out, in]`), or a list of one;
                emptied.
            model: the model that is being loaded.
            **kwargs: further arguments that transformers passes.

        Returns:
            Stored parts, and unchanged tensors, by full name.
        """
        converted: dict[str, Tensor] = {}
        for name in list(input_dict):
            value = input_dict.pop(name)  # let go of the dense weight as soon as it is quantized
            dense = value[0] if isinstance(value, list) else value
            layer = module_of(model, name)
            if layer is None:
                converted[name] = dense
                continue
            self.progress.begin()
            with trainable_tensors():
                converted.update(self._quantize(name, layer, dense))
            self.progress.add(dense)
        return converted

    def _quantize(self, key: str, layer: SVDQLinear | SVDQExperts, dense: Tensor) -> dict[str, Tensor]:
        if isinstance(layer, SVDQLinear):
            stored, transposed = WeightName(key.removesuffix(".weight"), layer.shape), layer.transposed
        else:
            stored, transposed = WeightName(key, layer.stacks[_leaf(key)]), layer.layout.transposed
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


def _check_shape(stored: WeightName, dense: Tensor, *, transposed: bool) -> None:
    expected = list(stored.dense_shape(transposed=transposed))
    if list(dense.shape) != expected:
        raise ValueError(
            f"could not quantize {stored.name}: the checkpoint's weight is {list(dense.shape)}, "
            f"the model's config says {expected}"
        )


def _leaf(key: str) -> str:
    return key.rpartition(".")[2]


def module_of(model: PreTrainedModel, param_name: str) -> SVDQLinear | SVDQExperts | None:
    """The quantized module that a dense tensor is a weight of; None where it is not one.

    Args:
        model: the model.
        param_name: full name of the tensor.
    """
    path, _, leaf = param_name.rpartition(".")
    module = model.get_submodule(path)
    if isinstance(module, SVDQExperts):
        return module if leaf in module.stacks else None
    return module if isinstance(module, SVDQLinear) and leaf == "weight" else None
