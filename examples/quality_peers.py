"""The peers of bench_quality.py: other packages' own code, one small function for each method.

A function takes a weight `[out, in]`, float32, and what the layer saw (or None), and says what is
stored and how it comes back. Scales go in half precision where the package takes the weight's own
dtype, as it would from a model in 16 bits. What cannot run here says so by its own error.

Rows that say so are our code: `awq` by the formula of arXiv 2306.00978 without its clipping (its packages,
autoawq and llmcompressor, work on whole models of known families), and those of `quality_published` and
`quality_trellis`.
"""

import importlib
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from quality_gguf import by_llama_cpp
from quality_published import higgs, round_group, rtn, sinq_nf4
from quality_trellis import trellis
from torch import Tensor, nn

from svdq_hf.calibration.inputs import InputStatistics


class Packed(NamedTuple):
    """A quantized layer: bits of the tensors stored for it, and the weight `[out, in]` they stand for."""

    bits: int
    dequantize: Callable[[], Tensor]


class Peer(NamedTuple):
    """A method: the modules it imports, its function, and whether that needs the layer's inputs."""

    modules: tuple[str, ...]
    quantize: Callable[[Tensor, InputStatistics | None], Packed]
    data: bool = False

    def missing(self) -> str | None:
        """Why it cannot be imported; None where it can."""
        try:
            for module in self.modules:
                importlib.import_module(module)
        except Exception as error:  # a broken package raises whatever it likes
            return f"{type(error).__name__}: {error}".splitlines()[0]
        return None


def stored_bits(*parts: object) -> int:
    """Bits of all tensors among `parts`, however deep they lie in lists and dicts; others are no data.

    >>> stored_bits([torch.zeros(3, dtype=torch.uint8), {"scale": torch.zeros(1)}, "4bit"])
    56
    """
    total = 0
    for part in parts:
        if isinstance(part, Tensor):
            total += 8 * part.nbytes
        elif isinstance(part, Mapping):
            total += stored_bits(*part.values())
        elif isinstance(part, Iterable) and not isinstance(part, str):
            total += stored_bits(*part)
    return total


def bitsandbytes(weight: Tensor, inputs: InputStatistics | None, *, double: bool) -> Packed:
    """NF4 in blocks of 64; double: the blocks' scales in 8 bits. Its tables are stored with every layer."""
    from bitsandbytes import functional as bnb

    codes, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=double, quant_type="nf4")
    return Packed(stored_bits(codes, state.as_dict()), lambda: bnb.dequantize_4bit(codes, state))


def hqq(weight: Tensor, inputs: InputStatistics | None, *, axis: int) -> Packed:
    """HQQ, group 64, along the inputs (axis 1, its default) or along the outputs (axis 0)."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=4, group_size=64, axis=axis)
    layer = HQQLinear(_linear(weight), config, compute_dtype=torch.float16, device="cpu")
    return Packed(stored_bits(layer.W_q, layer.meta["scale"], layer.meta["zero"]), layer.dequantize)


def sinq(weight: Tensor, inputs: InputStatistics | None, *, method: str) -> Packed:
    """SINQ, group 64; "sinq" is the paper's, scales in 8 bits; "dual", its default, normalizes nothing."""
    from sinq.sinqlinear import BaseQuantizeConfig, SINQLinear

    config = BaseQuantizeConfig(nbits=4, group_size=64, method=method)
    layer = SINQLinear(_linear(weight), config, compute_dtype=torch.float16, device="cpu")
    return Packed(stored_bits(layer.W_q, layer.meta), layer.dequantize)


def torchao(weight: Tensor, inputs: InputStatistics | None, *, algorithm: str) -> Packed:
    """The int4 weights that torchao has for CPUs, group 64; read back through its own kernel, in bfloat16."""
    from torchao.prototype.quantization.int4.int4_opaque_tensor import Int4OpaqueTensor
    from torchao.quantization.quantize_.workflows import Int4ChooseQParamsAlgorithm

    chosen = Int4ChooseQParamsAlgorithm(algorithm)
    layer = Int4OpaqueTensor.from_hp(weight.bfloat16(), [1, 64], int4_choose_qparams_algorithm=chosen)
    one = torch.eye(weight.shape[1], dtype=torch.bfloat16)  # the kernel for float16 takes 100 times as long
    return Packed(stored_bits(layer.qdata, layer.scale_and_zero), lambda: nn.functional.linear(one, layer).T)


def quanto(weight: Tensor, inputs: InputStatistics | None, *, optimizer: str) -> Packed:
    """optimum-quanto's qint4, group 64 (its own choice would be 128 where that divides the width)."""
    from optimum import quanto as package

    fit = getattr(package, optimizer)()
    half = weight.half()
    scale, shift = fit(half, qtype=package.qint4, axis=0, group_size=64)
    layer = package.quantize_weight(half, package.qint4, 0, scale, shift, 64)
    return Packed(stored_bits(layer._data._data, layer._scale, layer._shift), layer.dequantize)


def gguf(weight: Tensor, inputs: InputStatistics | None, *, kind: str) -> Packed:
    """The rounding of llama.cpp's formats, as its Python package has it."""
    from gguf import GGMLQuantizationType, quants

    qtype = GGMLQuantizationType[kind]
    stored = quants.quantize(weight.numpy(), qtype)
    return Packed(8 * stored.nbytes, lambda: torch.from_numpy(quants.dequantize(stored, qtype)))


def rounded(
    weight: Tensor, inputs: InputStatistics | None, *, by: Callable[..., Any], **choices: Any
) -> Packed:
    """What a rounding that returns bits and weight makes of a layer."""
    bits, found = by(weight, **choices)
    return Packed(bits, lambda: found)


def gptq(weight: Tensor, inputs: InputStatistics | None, *, group: int, symmetric: bool) -> Packed:
    """GPTQ by llmcompressor, its defaults (damping 1 %, static order); inputs are the dense model's.

    Counted as its files have it: packed codes, scales in 16 bits, zero points in 4.
    """
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.utils import calculate_qparams
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

    gram, tokens = _gram(inputs)
    grouped = weight.unflatten(1, (-1, group))
    choices: dict[str, Any] = {"num_bits": 4, "group_size": group, "symmetric": symmetric}
    args = QuantizationArgs(type="int", strategy="group", actorder="static", **choices)
    scale, zero = calculate_qparams(grouped.amin(-1), grouped.amax(-1), args)
    scale = scale.half().float()
    found, _, fallback = quantize_weight(
        weight.clone()[None], gram[None] / tokens, scale[None], zero[None], None, args
    )
    if fallback.any():
        raise ValueError("the Hessian could not be factored: GPTQ fell back to plain rounding")
    return Packed(4 * weight.numel() + (16 if symmetric else 20) * scale.numel(), lambda: found[0])


def awq(weight: Tensor, inputs: InputStatistics | None, *, group: int) -> Packed:
    """AWQ: inputs scaled by norm^alpha, the best of 20 alphas by the error of the layer's output.

    Counted with one 16-bit scale per input, which AWQ folds into the layer before where it can.
    """
    gram, _ = _gram(inputs)
    norm = gram.diagonal().sqrt()
    norm = norm.clamp_min(1e-4 * float(norm.max()))
    best, least = weight, float("inf")
    for step in range(20):
        scale = norm ** (step / 20)
        scale = scale / (scale.max() * scale.min()).sqrt()
        grouped = (weight * scale).unflatten(1, (-1, group))
        found = round_group(grouped).flatten(1) / scale
        lost = found - weight
        error = float(((lost @ gram) * lost).sum())
        if error < least:
            best, least = found, error
    bits = 4 * weight.numel() + 20 * weight.numel() // group + 16 * weight.shape[1]
    return Packed(bits, lambda: best)


def _gram(inputs: InputStatistics | None) -> tuple[Tensor, int]:
    if inputs is None or inputs.gram is None:
        raise ValueError("this method needs the Gram matrix of the layer's inputs")
    return inputs.gram, inputs.tokens


def _linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
    return layer


_AO = ("torchao.prototype.quantization.int4.int4_opaque_tensor",)
_GPTQ = ("llmcompressor.modifiers.gptq.gptq_quantize",)
_LLAMA = ("gguf", "llama_cpp")
BASELINE = "nf4"
PEERS: dict[str, Peer] = {
    BASELINE: Peer(("bitsandbytes",), partial(bitsandbytes, double=False)),
    "nf4 double": Peer(("bitsandbytes",), partial(bitsandbytes, double=True)),
    "hqq g64": Peer(("hqq.core.quantize",), partial(hqq, axis=1)),
    "hqq g64 axis 0": Peer(("hqq.core.quantize",), partial(hqq, axis=0)),
    "sinq g64": Peer(("sinq.sinqlinear",), partial(sinq, method="sinq")),
    "sinq g64 nf4": Peer(("sinq.sinqlinear",), partial(sinq, method="sinq_nf4")),
    "sinq g64 dual": Peer(("sinq.sinqlinear",), partial(sinq, method="dual")),
    "torchao int4 g64": Peer(_AO, partial(torchao, algorithm="tinygemm")),
    "torchao int4 g64 hqq": Peer(_AO, partial(torchao, algorithm="hqq")),
    "quanto qint4 g64": Peer(("optimum.quanto",), partial(quanto, optimizer="MaxOptimizer")),
    "quanto qint4 g64 hqq": Peer(("optimum.quanto",), partial(quanto, optimizer="HqqOptimizer")),
    "gguf q4_0": Peer(("gguf.quants",), partial(gguf, kind="Q4_0")),
    "gguf q4_1": Peer(("gguf.quants",), partial(gguf, kind="Q4_1")),
    "gguf q3_k": Peer(_LLAMA, partial(rounded, by=partial(by_llama_cpp, kind="Q3_K"))),
    "gguf q4_k": Peer(_LLAMA, partial(rounded, by=partial(by_llama_cpp, kind="Q4_K"))),
    "gguf iq4_nl": Peer(_LLAMA, partial(rounded, by=partial(by_llama_cpp, kind="IQ4_NL"))),
    "gguf iq4_xs": Peer(_LLAMA, partial(rounded, by=partial(by_llama_cpp, kind="IQ4_XS"))),
    "rtn g128 (our code)": Peer((), partial(rounded, by=partial(rtn, group=128))),
    "sinq nf4 g64 (our code)": Peer((), partial(rounded, by=partial(sinq_nf4, group=64))),
    "higgs (our code)": Peer((), partial(rounded, by=higgs)),
    "trellis, window 12 (our code)": Peer((), partial(rounded, by=partial(trellis, window=12))),
    "gptq g64": Peer(_GPTQ, partial(gptq, group=64, symmetric=True), data=True),
    "gptq g64 asymmetric": Peer(_GPTQ, partial(gptq, group=64, symmetric=False), data=True),
    "gptq g128": Peer(_GPTQ, partial(gptq, group=128, symmetric=True), data=True),
    "awq g64 (our code)": Peer((), partial(awq, group=64), data=True),
    "awq g128 (our code)": Peer((), partial(awq, group=128), data=True),
}
"""Every peer by name; a new one is a function and a line here."""
