"""The Triton kernels go through Triton's compiler, and NVIDIA's assembler, for GPUs that are not here.

The interpreter knows neither types nor layouts: it runs what no GPU would. Triton brings all that this needs.
"""

import os
from typing import Any

import pytest

from svdq_hf.kernels.triton import backend
from svdq_hf.kernels.triton.arguments import Plan, Salient, Sizes, Tokens, Weight, Window
from svdq_hf.kernels.triton.shapes import shapes

pytestmark = [
    pytest.mark.skipif(not backend.is_here(), reason="Triton is not installed"),
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled in the interpreter"
    ),
]
PLAN = Plan(bits=4, group=32, single=False, tokens=1, rows=8, blocks=8)
WEIGHT = Weight("*i8", "*i8", "*bf16", "*bf16", "*i32", "*bf16")
SALIENT = Salient("*fp32", "*i32", "*i32")
IO = Tokens("*bf16", "*bf16")
SIZES = Sizes("i32", "i32", "i32", "i32", "i32")
WINDOW = Window("i32", "i32", "i32", "i32")
TILE = PLAN._replace(tokens=16, rows=64, blocks=1, terms=2)

KERNELS: dict[str, tuple[str, tuple[Any, ...], Plan]] = {
    "few": ("multiply_few", (IO, WEIGHT, SALIENT, SIZES), PLAN._replace(tokens=4)),
    "few, linear levels, a part of the columns": (
        "multiply_few",
        (IO._replace(sums="*fp32"), WEIGHT._replace(table=None, bias=None), SALIENT, SIZES),
        PLAN._replace(splits=2),
    ),
    "tile": ("multiply_tile", (IO, WEIGHT, SALIENT, SIZES), TILE._replace(tokens=64)),
    "tile, 3 bits, groups of 8": (
        "multiply_tile", (IO, WEIGHT, SALIENT, SIZES), TILE._replace(bits=3, group=8),
    ),
    "tile, 8 bits, a scale for all": (
        "multiply_tile",
        (Tokens("*fp32", "*fp32"), Weight("*i8", "*fp32"), Salient(), SIZES),
        TILE._replace(bits=8, group=0, single=True, terms=3),
    ),
    "experts": (
        "multiply_tile", (IO._replace(ends="*i64"), WEIGHT, SALIENT, SIZES), TILE._replace(experts=128),
    ),
    "splits": ("add_splits", (IO._replace(sums="*fp32"), WEIGHT, SALIENT, SIZES), TILE._replace(splits=4)),
    "dense": ("dequantize", (Tokens(None, "*bf16"), WEIGHT, SALIENT, SIZES, WINDOW), PLAN._replace(blocks=4)),
    "rows": ("dequantize", (Tokens("*i64", "*fp32"), WEIGHT, SALIENT, SIZES, WINDOW), PLAN._replace(rows=1)),
}  # fmt: skip
TARGETS = {"sm_90": ("cuda", 90, 32), "sm_80": ("cuda", 80, 32), "gfx942": ("hip", "gfx942", 64)}
FEW = {("sm_90", name) for name in ("few", "tile", "experts", "dense")}
"""Compiled in each run; the others are slow together."""


def cases() -> list[Any]:
    return [
        pytest.param(
            target, name, id=f"{target} {name}", marks=[] if (target, name) in FEW else pytest.mark.slow
        )
        for target in TARGETS
        for name in KERNELS
    ]


def signature(arguments: tuple[Any, ...], at: tuple[int, ...] = ()) -> tuple[list[Any], dict[Any, Any]]:
    """Types of arguments, and the constants among them, by their places."""
    types, constants = [], {}
    for place, one in enumerate(arguments):
        if isinstance(one, tuple):
            inner, found = signature(one, (*at, place))
            types.append(type(one)(*inner))
            constants |= found
        else:
            types.append("constexpr" if one is None else one)
            constants |= {(*at, place): None} if one is None else {}
    return types, constants


@pytest.mark.parametrize(("target", "name"), cases())
def test_a_kernel_is_compiled_for_a_gpu_that_is_not_here(target, name, monkeypatch, tmp_path):
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from svdq_hf.kernels.triton import kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel, arguments, plan = KERNELS[name]
    function = getattr(kernels, kernel)
    types, constants = signature(arguments)
    names = function.arg_names
    source = ASTSource(
        fn=function,
        signature=dict(zip(names, [*types, "constexpr"], strict=True)),
        constexprs={**constants, (len(types),): plan._replace(operand=tl.bfloat16)},
    )
    shape = shapes()["default"][
        "tile" if plan.rows == 64 else "dequantize" if kernel == "dequantize" else "few"
    ]
    options = {"num_warps": shape.warps, "num_stages": shape.stages, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)
    assert compiled.asm["cubin" if target.startswith("sm") else "hsaco"]
    assert compiled.metadata.shared <= 48 << 10  # what every GPU has without being asked
