"""One linear layer of a model -> the quantized one that stands for it, and back.

Not here: which layers there are (`selection`), and the loop over them (`convert`).
"""

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from svdq_hf.calibration.inputs import InputStatistics
from svdq_hf.config import SVDQConfig
from svdq_hf.core.saliency import Scored
from svdq_hf.nn.embedding import SVDQEmbedding
from svdq_hf.nn.linear import SVDQLinear
from svdq_hf.quantize.selection import dense_weight, shape_of
from svdq_hf.quantize.weight import quantize_weight


def matrix_of(module: nn.Module) -> Tensor:
    """The weight of a dense layer as `[out, in]`, whichever way round it is stored; a view."""
    weight = dense_weight(module)
    return weight.T if isinstance(module, Conv1D) else weight


def empty_layer(module: nn.Module, config: SVDQConfig, device: str = "meta") -> SVDQLinear:
    """An SVDQLinear of the shape of a dense layer, with nothing in it yet."""
    out, in_features = shape_of(module)
    layer = SVDQLinear(
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
    """The quantized layer of a dense one; it trains what that trains.

    inputs, scored: see `quantize_weight`.

    Raises:
        ValueError: see `quantize_weight`.
    """
    layer = empty_layer(module, config.of_layer(name))
    parts, layer.facts = quantize_weight(matrix_of(module), config, name, inputs, scored)
    layer.load_parts(parts)
    layer.bias = module.bias  # type: ignore[assignment]
    trains = dense_weight(module, detach=False).requires_grad and layer.salient_values.numel() > 0
    layer.salient_values.requires_grad_(trains)
    return layer


def dense_layer(layer: SVDQLinear, dtype: torch.dtype, *, trains: bool = True) -> nn.Module:
    """The `nn.Linear` (or `Conv1D`, or embedding) that an SVDQLinear stands for.

    Its weight trains if the salient weights did; trains: where there are none that could.
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
