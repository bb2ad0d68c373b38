"""Checks of a quantized layer on a GPU: right, compiled, in a graph, in training, as embedding and experts.

`bench_gpu.py` runs them before it times anything, and tests/kernels/triton/test_gpu.py as tests. They need
torch and Triton alone.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor, nn

from svdq_hf.core.grid import Grid
from svdq_hf.core.topk import salient_count, top_positions
from svdq_hf.format.encode import decompose
from svdq_hf.format.parts import Scheme, StoredWeight
from svdq_hf.kernels import backends, cpu_direct, reference
from svdq_hf.kernels.embedding_op import EMBEDDING as _EMBEDDING  # noqa: F401  # defines the op
from svdq_hf.kernels.experts_op import expert_linear
from svdq_hf.nn.linear import SVDQLinear

BEST = Grid(group_size=32, levels="normal", column_scale=True, scale_bits=8)
"""The grid of `SVDQConfig()`."""
GRIDS = (
    BEST,
    Grid(group_size=64),
    Grid(group_size="row", levels="normal"),
    Grid(group_size=16, column_scale=True),
    Grid(bits=3, group_size=32, levels="normal", column_scale=True, scale_bits=8),
    Grid(bits=8, group_size=64),
)
ROUNDED = {torch.float32: 0.0, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
"""How far one rounding, in whichever direction, moves a number."""


def packed(weight: Tensor, grid: Grid = BEST, k: int = 256) -> SVDQLinear:
    """A quantized layer without bias, on the weight's device; its largest weights are salient."""
    scheme = Scheme(k, grid)
    positions = top_positions(weight.abs(), salient_count(k, *weight.shape))
    layer = SVDQLinear(weight.shape[1], weight.shape[0], scheme, bias=False, device=weight.device)
    layer.load_parts(decompose(weight, *positions, scheme))
    return layer


def sides(device: str) -> tuple[int, int]:
    """Rows and columns of a layer to check: no multiples of a tile; few in the interpreter, which is slow."""
    return (200, 330) if device == "cuda" else (20, 100)


def random_layer(device: str, out: int = 0, in_features: int = 0, grid: Grid = BEST) -> SVDQLinear:
    """A quantized layer of random weights, of `sides` where no others are given."""
    rows, columns = sides(device)
    return packed(torch.randn(out or rows, in_features or columns).to(device), grid, 99)


@contextmanager
def triton_first() -> Iterator[None]:
    """Context manager: Triton computes all that it can, in the interpreter also what the C library could."""
    ours = tuple(one for one in backends.BACKENDS if one.name != "native")
    with patch.object(backends, "BACKENDS", ours), patch.object(cpu_direct, "linear", lambda *call: None):
        yield


def check_backend(device: str) -> None:
    """The kernels compute here, and not the reference."""
    taken = random_layer(device).backend(torch.zeros(1, sides(device)[1], device=device))
    assert taken.taken == "triton", taken


def check_products(device: str) -> None:
    """Every grid, dtype and way by tokens against the reference in float64, on the CPU."""
    for grid in GRIDS:
        layer = random_layer(device, grid=grid)
        weight = layer.dequantize().cpu().double()
        for tokens in (1, 3, 4, 16, 64, 100):
            for dtype, rounding in ROUNDED.items():
                x = torch.randn(tokens, sides(device)[1]).to(device, dtype)
                wide = x.cpu().double()
                right, size = wide @ weight.T, wide.abs() @ weight.abs().T
                more = rounding if tokens > 64 else 0.0  # dense rows are rounded, as those of a dense layer
                allowed = (1e-6 + more) * size + rounding * right.abs() + 1e-7
                with torch.no_grad():
                    off = (layer(x).cpu().double() - right).abs() - allowed
                assert off.max() <= 0, f"{grid}, {tokens} tokens, {dtype}: {float(off.max()):.2e} too much"


def check_same_bits(device: str) -> None:
    """Two runs give the same bits: no sum depends on who comes first."""
    columns = 4096 if device == "cuda" else 100
    layer = random_layer(device, 20, columns)
    for tokens in (1, 16, 100):
        x = torch.randn(tokens, columns, device=device)
        assert torch.equal(layer(x), layer(x))


@torch.enable_grad()
def check_training(device: str) -> None:
    """Gradients of x and of the salient values are the reference's; a step lowers the loss."""
    layer = random_layer(device)
    out, columns = sides(device)
    x, wanted = torch.randn(8, columns, device=device, requires_grad=True), torch.randn(8, out, device=device)
    stored, _ = layer.stored_and_bias()
    off = layer(x) - wanted
    off.square().mean().backward()
    upstream = (2 / wanted.numel() * off).detach().cpu()
    cpu = StoredWeight(*(None if part is None else part.detach().cpu() for part in stored))
    expected = reference.input_gradient(upstream, cpu, columns, layer.group)
    torch.testing.assert_close(x.grad.cpu(), expected, rtol=1e-4, atol=1e-6)
    by_hand = upstream.T @ x.detach().cpu()
    found = by_hand[cpu.salient_rows.long(), cpu.salient_columns.long()]
    torch.testing.assert_close(layer.salient_values.grad.cpu(), found, rtol=1e-4, atol=1e-6)
    torch.optim.SGD([layer.salient_values], 0.5).step()
    assert (layer(x) - wanted).square().mean() < off.square().mean()


def check_embedding_and_experts(device: str) -> None:
    """Rows of an embedding, and experts in one launch, against dense products on the CPU."""
    layers = [random_layer(device) for _ in range(4)]
    out, columns = sides(device)
    ids = torch.tensor([[0, out - 1, 7], [7, 7, 1]], device=device)
    stored = layers[0].stored_and_bias()[0]
    rows = torch.ops.svdq.embedding(ids, *stored, columns, layers[0].group, torch.float32)
    assert torch.equal(rows, layers[0].dequantize()[ids])
    x = torch.randn(9, columns, device=device)
    each = [layer.stored_and_bias()[0] for layer in layers]
    parts = (None if part[0] is None else torch.stack(part) for part in zip(*each, strict=True))
    ends = torch.tensor([2, 2, 7, 8], device=device)
    y = expert_linear(x, *parts, ends, columns, layers[0].group, False)
    for layer, start, end in ((layers[0], 0, 2), (layers[2], 2, 7), (layers[3], 7, 8)):
        right = x[start:end].double() @ layer.dequantize().double().T
        torch.testing.assert_close(y[start:end].double(), right, rtol=1e-5, atol=1e-4)
    assert not y[8:].any()


def small_model(device: str) -> nn.Module:
    """Two quantized layers with a gate between them."""
    first, second = random_layer(device, 256, 320), random_layer(device, 320, 256)
    return nn.Sequential(first, nn.SiLU(), second).requires_grad_(False)


def check_compiled(device: str) -> None:
    """torch.compile takes the model whole, and gives what it gives."""
    model, x = small_model(device), torch.randn(3, 320, device=device)
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x))


def check_compiled_with_graphs(device: str) -> None:
    """torch.compile's own CUDA graphs are not skipped."""
    from torch._dynamo.utils import counters

    counters.clear()
    model = small_model(device)
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    for _ in range(4):
        x = torch.randn(2, 320, device=device)
        torch.testing.assert_close(compiled(x).clone(), model(x))
    assert counters["inductor"]["cudagraph_skips"] == 0


def check_graph(device: str) -> None:
    """A captured call, replayed with other activations."""
    model = small_model(device)
    for tokens in (1, 16, 100):
        x = torch.randn(tokens, 320, device=device)
        graph, y = captured(lambda x=x: model(x))
        x.copy_(torch.randn(tokens, 320))
        graph.replay()
        torch.testing.assert_close(y, model(x))


def captured(call: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A CUDA graph of a call, and the tensor that it writes."""
    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = call()
    return graph, y


ANYWHERE = (check_backend, check_products, check_same_bits, check_training, check_embedding_and_experts)
"""Checks for every device, the interpreter's too."""
ON_CUDA = (check_compiled, check_compiled_with_graphs, check_graph)
"""Checks that need CUDA."""
