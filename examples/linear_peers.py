"""The layers of bench_linear.py: a dense layer's weight in each package's own 4-bit module.

A function takes a weight `[out, in]`, float32, and the dtype of the activations, and gives what is called
with them. Settings are each package's own defaults, with groups of 64.
"""

import importlib
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from svdq_hf import SVDQConfig
from svdq_hf.quantize.convert import convert_layers

Call = Callable[[Tensor], Tensor]
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def linear(weight: Tensor, dtype: torch.dtype) -> nn.Linear:
    """A dense layer without bias."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.to(dtype, copy=True), requires_grad=False)
    return layer


def svdq(weight: Tensor, dtype: torch.dtype, *, k: int = 256, compute: str = "exact", bits: int = 4) -> Call:
    """Ours at the default grid; which entries are kept does not change the time, so they are random."""
    model = nn.Sequential(linear(weight, F32))
    convert_layers(model, SVDQConfig(k=k, saliency="random", compute=compute, bits=bits))
    return model[0]


def bitsandbytes(weight: Tensor, dtype: torch.dtype) -> Call:
    """NF4."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    out, in_features = weight.shape
    layer = Linear4bit(in_features, out, bias=False, compute_dtype=dtype, quant_type="nf4")
    layer.weight = Params4bit(weight.to(dtype), requires_grad=False, quant_type="nf4", module=layer)
    return layer.to("cpu")


def torchao(weight: Tensor, dtype: torch.dtype) -> Call:
    """The int4 weights that torchao has for CPUs."""
    from torchao.prototype.quantization.int4.int4_opaque_tensor import Int4OpaqueTensor

    packed = Int4OpaqueTensor.from_hp(weight.to(dtype), [1, 64])
    return lambda x: nn.functional.linear(x, packed)


def hqq(weight: Tensor, dtype: torch.dtype) -> Call:
    """HQQ's 4 bits."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=4, group_size=64)
    return HQQLinear(linear(weight, dtype), config, compute_dtype=dtype, device="cpu")


def quanto(weight: Tensor, dtype: torch.dtype) -> Call:
    """optimum-quanto's qint4."""
    from optimum.quanto import freeze, qint4, quantize

    model = nn.Sequential(linear(weight, dtype))
    quantize(model, weights=qint4)
    freeze(model)
    return model


def onnxruntime(weight: Tensor, dtype: torch.dtype, *, accuracy: int) -> Call:
    """MatMulNBits, 4 bits, blocks of 32, in a session of its own; accuracy: 1 sums float32, 4 int8 products.

    Its threads do not spin, or they would take torch's.
    """
    from onnx import TensorProto, helper, numpy_helper
    from onnxruntime import InferenceSession, SessionOptions

    out, in_features = weight.shape
    groups = weight.reshape(out, -1, 32)
    scale = groups.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 7
    codes = ((groups / scale).round() + 8).clamp(0, 15).to(torch.uint8)
    packed = codes[..., ::2] | codes[..., 1::2] << 4
    stored = {"b": packed.numpy(), "s": scale.reshape(-1).numpy()}
    node = helper.make_node(
        "MatMulNBits", ["x", *stored], ["y"], domain="com.microsoft",
        K=in_features, N=out, bits=4, block_size=32, accuracy_level=accuracy,
    )  # fmt: skip
    graph = helper.make_graph(
        [node],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["tokens", in_features])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["tokens", out])],
        [numpy_helper.from_array(part, name) for name, part in stored.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    options = SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


class Contender(NamedTuple):
    """A layer to time: the module it imports, how it is made, the dtype it is fed, its largest error."""

    module: str
    make: Callable[[Tensor, torch.dtype], Call]
    dtype: torch.dtype
    error: float = 0.2

    def missing(self) -> str | None:
        """Why it cannot be imported; None where it can."""
        try:
            importlib.import_module(self.module)
        except Exception as error:  # a broken package raises whatever it likes
            return f"{type(error).__name__}: {error}".splitlines()[0]
        return None


BASELINE = "dense fp32"
CONTENDERS: dict[str, Contender] = {
    BASELINE: Contender("torch", linear, F32, 1e-5),
    "dense bf16": Contender("torch", linear, BF16, 2e-2),
    "dense fp16": Contender("torch", linear, F16, 2e-2),
    "svdq": Contender("svdq_hf", svdq, F32),
    "svdq fast": Contender("svdq_hf", partial(svdq, compute="fast"), F32),
    "svdq k=0": Contender("svdq_hf", partial(svdq, k=0), F32),
    "svdq k=4096": Contender("svdq_hf", partial(svdq, k=4096), F32),
    "svdq 3 bits": Contender("svdq_hf", partial(svdq, bits=3), F32, 0.4),
    "svdq 8 bits": Contender("svdq_hf", partial(svdq, bits=8), F32, 0.02),
    "svdq, bf16 in": Contender("svdq_hf", svdq, BF16),
    "svdq, fp16 in": Contender("svdq_hf", svdq, F16),
    "bitsandbytes nf4": Contender("bitsandbytes", bitsandbytes, F32),
    "bitsandbytes nf4, bf16 in": Contender("bitsandbytes", bitsandbytes, BF16),
    "torchao int4, bf16 in": Contender(
        "torchao.prototype.quantization.int4.int4_opaque_tensor", torchao, BF16
    ),
    "hqq": Contender("hqq.core.quantize", hqq, F32),
    "hqq, bf16 in": Contender("hqq.core.quantize", hqq, BF16),
    "quanto qint4": Contender("optimum.quanto", quanto, F32),
    "quanto qint4, bf16 in": Contender("optimum.quanto", quanto, BF16),
    "onnxruntime": Contender("onnxruntime", partial(onnxruntime, accuracy=1), F32),
    "onnxruntime, int8 activations": Contender("onnxruntime", partial(onnxruntime, accuracy=4), F32),
}
"""Who is timed, by name; `dense fp32` is what the others are divided by."""
