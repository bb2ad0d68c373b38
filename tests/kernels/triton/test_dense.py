"""What the Triton kernels compute beside products: dense rows, gradients, embeddings, experts; by the ops."""

import pytest
import torch
from triton_products import GRIDS, assert_right, dense, made

from svdq_hf.format.parts import StoredWeight
from svdq_hf.kernels import backends, experts_op, linear_op, reference
from svdq_hf.kernels import embedding_op as _embedding_op  # noqa: F401  # defines torch.ops.svdq.embedding
from svdq_hf.kernels.backends import Backend
from svdq_hf.kernels.triton import backend
from svdq_hf.kernels.triton.arguments import Window


@pytest.fixture
def triton_first(monkeypatch: pytest.MonkeyPatch) -> Backend:
    """Triton computes what it can, also where the C library could."""
    (triton,) = [one for one in backends.BACKENDS if one.name == "triton"]
    monkeypatch.setattr(backends, "BACKENDS", (triton, backends.BACKENDS[-1]))
    return triton


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_window_of_the_weight_is_the_references_bit_for_bit(grid, split, device):
    from svdq_hf.kernels.triton import launch

    stored, *numbers = made(split, 19, 300, 40, device=device, **grid)
    whole = dense(stored, *numbers)
    for window in (Window(0, 19, 0, 300), Window(3, 9, 64, 200)):
        rows, columns = slice(window.row, window.row + window.rows), slice(window.column, None)
        found = launch.dense(stored, window, *numbers, torch.float32)
        assert torch.equal(found, whole[rows, columns][:, : window.columns])


def test_windows_cover_a_weight(monkeypatch, device):
    from svdq_hf.kernels.triton import launch

    monkeypatch.setattr(launch, "DENSE_WEIGHTS", 1000)
    assert list(launch.windows(9, 300, by_rows=True)) == [Window(row, 3, 0, 300) for row in (0, 3, 6)]
    blocks = list(launch.windows(9, 300, by_rows=False))
    assert blocks == [Window(0, 9, column, min(64, 300 - column)) for column in range(0, 300, 64)]


@pytest.mark.parametrize("weights", [1 << 26, 1000], ids=["one block", "blocks"])
def test_the_product_and_the_input_gradient_of_many_tokens(weights, split, device, monkeypatch):
    from svdq_hf.kernels.triton import launch

    monkeypatch.setattr(launch, "DENSE_WEIGHTS", weights)
    stored, *numbers = made(split, 9, 200, device=device, **GRIDS[0])
    x, gradient = torch.randn(70, 200, device=device), torch.randn(2, 3, 9, device=device)
    assert_right(backend.linear(x, stored, None, *numbers), x, stored, None, *numbers)
    expected = reference.input_gradient(gradient, stored, *numbers)
    torch.testing.assert_close(backend.input_gradient(gradient, stored, *numbers), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_the_op_are_the_references(dtype, split, device, triton_first, monkeypatch):
    stored, *numbers = made(split, 9, 70, device=device, **GRIDS[0])
    found = []
    for _ in ("triton", "reference"):
        torch.manual_seed(1)
        values = stored.salient_values.clone().requires_grad_()
        x, bias = torch.randn(6, 70, device=device).to(dtype), torch.randn(9, device=device)
        leaves = x.requires_grad_(), bias.requires_grad_(), values
        y = linear_op.linear(x, *stored._replace(salient_values=values), bias, *numbers)
        y.backward(torch.randn_like(y))
        found.append([y.detach(), *(leaf.grad for leaf in leaves)])
        monkeypatch.setattr(backends, "BACKENDS", backends.BACKENDS[-1:])
    # The reference rounds the weight to bfloat16, for y too: relative to terms of about one, of which 70.
    bound = 1e-5 if dtype == torch.float32 else 0.1
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=bound, atol=bound)


@pytest.mark.parametrize("ids_dtype", [torch.int64, torch.int32], ids=str)
def test_rows_of_an_embedding_are_those_of_the_weight(ids_dtype, split, device, triton_first):
    stored, *numbers = made(split, 20, 130, 40, device=device, **GRIDS[0])
    ids = torch.tensor([[0, 19, 7], [7, 1, 19]], dtype=ids_dtype, device=device)
    found = torch.ops.svdq.embedding(ids, *stored, *numbers, torch.float32)
    assert torch.equal(found, dense(stored, *numbers)[ids.long()])
    assert torch.ops.svdq.embedding(ids[:0], *stored, *numbers, torch.bfloat16).shape == (0, 3, 130)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a number that is no row would stop the GPU")
def test_a_number_that_is_no_row_is_refused(split, device, triton_first):
    stored, *numbers = made(split, 20, 130, device=device)
    for wrong in (-1, 20):
        with pytest.raises(RuntimeError, match=r"an id is not in 0\.\.19"):
            torch.ops.svdq.embedding(torch.tensor([wrong]), *stored, *numbers, torch.float32)


ENDS = [[3, 3, 20, 21, 21], [0, 0, 0, 0, 22], [1, 2, 3, 4, 5], [0, 0, 0, 0, 0]]


def stacked(split, device, **grid):
    """Five experts, one of them without salient weights that count, and their numbers."""
    each = [made(split, 20, 130, 12, device=device, **grid) for _ in range(5)]
    parts = zip(*(stored for stored, *_ in each), strict=True)
    stack = StoredWeight(*(None if part[0] is None else torch.stack(part) for part in parts))
    return stack, [stored for stored, *_ in each], each[0][1:]


@pytest.mark.parametrize("ends", ENDS, ids=str)
@pytest.mark.parametrize("grid", [GRIDS[0], GRIDS[4]], ids=str)
def test_each_token_meets_its_expert_in_one_launch(ends, grid, split, device, triton_first):
    stack, each, numbers = stacked(split, device, **grid)
    x = torch.randn(25, 130, device=device)
    y = experts_op.expert_linear(x, *stack, torch.tensor(ends, device=device), *numbers, False)
    start = 0
    for stored, end in zip(each, ends, strict=True):
        assert_right(y[start:end], x[start:end], stored, None, *numbers)
        start = end
    assert not y[start:].any()


def test_experts_of_no_tokens_and_wrong_ends_and_positions(split, device):
    """Ends are not looked at on a GPU: wrong ones leave rows zero, or give them to another expert."""
    stack, _, numbers = stacked(split, device)
    x = torch.randn(4, 130, device=device)
    ends = torch.tensor([-3, 9, 2, 100, 4], device=device)
    assert backend.experts(x, stack, ends, *numbers).isfinite().all()
    assert backend.experts(x[:0], stack, ends * 0, *numbers).shape == (0, 20)
    rows = stack.salient_rows.clone()
    rows[2, -1] = 20
    with pytest.raises(ValueError, match="out of range: salient_rows has 20"):
        backend.experts(x, stack._replace(salient_rows=rows), ends, *numbers)
