"""The other packages' 4-bit layers of bench_gpu.py: a function makes one of a weight `[out, in]` on a GPU."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

Call = Callable[[Tensor], Tensor]


def bitsandbytes(weight: Tensor) -> Call:
    """NF4, blocks of 64."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    out, in_features = weight.shape
    layer = Linear4bit(in_features, out, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    layer.weight = Params4bit(weight.to(torch.bfloat16).cpu(), requires_grad=False, quant_type="nf4")
    return layer.to(weight.device)


def torchao(weight: Tensor) -> Call:
    """int4, groups of 64."""
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    model = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta"))
    model[0].weight = nn.Parameter(weight.to(torch.bfloat16), requires_grad=False)
    quantize_(model, Int4WeightOnlyConfig(group_size=64))
    return model


def hqq(weight: Tensor) -> Call:
    """HQQ's 4 bits, groups of 64, by gemlite's kernels."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
    from hqq.utils.patching import prepare_for_inference

    dense = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    dense.weight = nn.Parameter(weight.to(torch.bfloat16), requires_grad=False)
    config = BaseQuantizeConfig(nbits=4, group_size=64, axis=1)
    model = nn.Sequential(HQQLinear(dense, config, compute_dtype=torch.bfloat16, device=str(weight.device)))
    prepare_for_inference(model, backend="gemlite")
    return model


PEERS: dict[str, Callable[[Tensor], Call]] = {
    "bitsandbytes nf4": bitsandbytes,
    "torchao int4": torchao,
    "hqq, gemlite": hqq,
}
