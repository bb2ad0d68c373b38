"""One linear layer: the dense module -> the quantized one, and back.

Not here: which layers there are (`quantize.selection`), and the loop over them (`quantize.convert`).
"""

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from svdq_hf.calibration.inputs import InputStatistics
from svdq_hf.config import SVDQConfig
from svdq_hf.core.saliency import Scored
from svdq_hf.nn.embedding import SVDQEmbedding
from svdq_hf.nn.integer_linear import SVDQIntegerLinear
from svdq_hf.nn.linear import SVDQLinear
from svdq_hf.quantize.integer_weight import quantize_integer_weight
from svdq_hf.quantize.selection import dense_weight, shape_of
from svdq_hf.quantize.weight import quantize_weight


def matrix_of(module: nn.Module) -> Tensor:
    """The weight of a dense layer as `[out, in]`, a view; `Conv1D` stores it transposed."""
    weight = dense_weight(module)
    return weight.T if isinstance(module, Conv1D) else weight


def empty_layer(module: nn.Module, config: SVDQConfig, device: str = "meta") -> SVDQLinear:
    """An SVDQLinear with the shape of a dense layer and with buffers that hold no values yet.

    Args:
        module: the dense layer.
        config: of this layer (`SVDQConfig.of_layer`).
        device: of the buffers.
    """
    out, in_features = shape_of(module)
    kind = SVDQLinear if config.activations is None else SVDQIntegerLinear
    layer = kind(
        in_features,
        out,
        config.scheme,
        bias=module.bias is not None,
        dtype=dense_weight(module).dtype,
        device=device,
        compute_dtype=config.torch_compute_dtype,
        fast=config.compute == "fast",
        transposed=isinstance(module, Conv1D),
    )
    return layer.train(module.training)


def quantized_layer(
    name: str,
    module: nn.Module,
    config: SVDQConfig,
    inputs: InputStatistics | None = None,
    scored: Scored | None = None,
) -> SVDQLinear:
    """The SVDQLinear for a dense layer; its salient weights train where the dense weight did.

    Args:
        name: of the layer, for its k and for errors.
        module: the dense layer.
        config: of the whole model.
        inputs: statistics of its inputs, for scores and error feedback that need data.
        scored: the result of `score_weight`, where it is known already.

    Raises:
        ValueError: see `quantize_weight`.
    """
    layer = empty_layer(module, config.of_layer(name))
    if config.activations is None:
        parts, layer.facts = quantize_weight(matrix_of(module), config, name, inputs, scored)
    else:
        parts, layer.facts = quantize_integer_weight(matrix_of(module), config, name, inputs)
    layer.load_parts(parts)
    layer.bias = module.bias  # type: ignore[assignment]
    trains = dense_weight(module, detach=False).requires_grad and layer.salient_values.numel() > 0
    layer.salient_values.requires_grad_(trains)
    return layer


def dense_layer(layer: SVDQLinear, dtype: torch.dtype, *, trains: bool = True) -> nn.Module:
    """The dense layer (`nn.Linear`, `Conv1D` or an embedding) that a quantized one represents.

    Args:
        layer: the quantized layer.
        dtype: of the dense weight and bias.
        trains: whether the weight of a layer without salient weights requires a gradient; otherwise the
            dense weight does where the salient weights did.
    """
    if isinstance(layer, SVDQEmbedding):
        return layer.restored(nn.Parameter(layer.dequantize().to(dtype), trains))
    if layer.salient_values.numel():
        trains = layer.salient_values.requires_grad
    out, in_features = layer.out_features, layer.in_features
    with torch.device("meta"):
        dense: nn.Module
        if layer.transposed:
            dense = Conv1D(out, in_features)
        else:
            dense = nn.Linear(in_features, out, bias=layer.bias is not None)
    weight = layer.dequantize().to(dtype)
    dense.weight = nn.Parameter(weight.T.contiguous() if layer.transposed else weight, trains)
    if layer.bias is not None:
        dense.bias = nn.Parameter(layer.bias.detach().to(dtype), layer.bias.requires_grad)
    return dense.train(layer.training)
