"""A salient position that is not in the matrix, or out of order, is refused by every path of every op."""

import pytest
import torch
from torch import nn

from svdq_hf import dequantize_model
from svdq_hf.format.parts import StoredWeight
from svdq_hf.kernels import embedding_op, experts_op, positions  # noqa: F401  # define torch.ops.svdq
from svdq_hf.nn.linear import SVDQLinear

OPS = torch.ops.svdq
OUT, IN = 100, 96


def with_wrong(parts, kind):
    """The parts with one salient position that is wrong; the issue's case: column 130 of 96."""
    rows, columns = parts["salient_rows"].clone(), parts["salient_columns"].clone()
    if kind == "order":
        rows = rows.flip(0)
    elif kind.startswith("row"):
        rows[0 if "-" in kind else -1] = int(kind.split()[1])
    else:
        columns[3] = int(kind.split()[1])
    return {**parts, "salient_rows": rows, "salient_columns": columns}


WRONG = ["column 130", "column 96", "column -1", "row 100", "row -1", "order"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("group_size", [8, 16, 32, "row"])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_every_op_refuses_it(bits, group_size, dtype, split, device):
    _, parts, scheme = split(OUT, IN, 40, bits=bits, group_size=group_size, device=device)
    for kind in WRONG:
        assert_refused(parts, with_wrong(parts, kind), (IN, scheme.grid.columns(IN)), dtype, device)


def assert_refused(parts, bad, numbers, dtype, device):
    stored = StoredWeight.of(bad)
    stack = StoredWeight.of({name: torch.stack([parts[name], bad[name]]) for name in parts})
    x, gradient = (torch.randn(2, width, dtype=dtype, device=device) for width in (IN, OUT))
    ends = torch.tensor([0, 2], device=device)
    for call in (
        lambda: OPS.linear(x, *stored, None, *numbers),
        lambda: OPS.input_gradient(gradient, *stored, *numbers),
        lambda: OPS.embedding(torch.tensor([0, 99], device=device), *stored, *numbers, dtype),
        lambda: OPS.expert_linear(x, *stack, ends, *numbers, False),
        lambda: OPS.expert_input_gradient(gradient, *stack, ends, *numbers, False),
        lambda: OPS.expert_values_gradient(x, gradient, stack.salient_rows, stack.salient_columns, ends),
    ):
        with pytest.raises(ValueError, match=r"salient position is out of (range|order)"):
            call()


@pytest.mark.parametrize("grid", [{"group_size": 32}, {"group_size": 16}, {"bits": 3}, {"bits": 8}], ids=str)
def test_a_state_dict_cannot_bring_it_in_unseen(grid, split):
    _, parts, scheme = split(OUT, IN, 40, **grid)
    layer = SVDQLinear(IN, OUT, scheme, bias=False)
    layer.load_state_dict(with_wrong(parts, "column 130"))
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients), pytest.raises(ValueError, match="out of range"):
            layer(torch.randn(2, IN))


@pytest.mark.parametrize("k", [40, 600], ids=["looked at each time", "remembered"])
def test_what_changes_after_a_call_is_seen(k, split):
    _, parts, scheme = split(OUT, IN, k, bits=8, group_size=16)  # which the reference computes
    assert (k > positions.EACH_TIME) == (k == 600)
    layer = SVDQLinear(IN, OUT, scheme, bias=False)
    layer.load_parts(parts)
    x = torch.randn(2, IN)
    with torch.no_grad():
        expected = layer(x)
        assert torch.equal(layer(x), expected)
        layer.salient_columns[3] += IN  # counts as a version of the tensor
        with pytest.raises(ValueError, match="salient_columns has"):
            layer(x)
        layer.salient_columns[3] -= IN
        assert torch.equal(layer(x), expected)
        layer.salient_columns.data = with_wrong(parts, "column 130")["salient_columns"]  # other memory
        with pytest.raises(ValueError, match="salient_columns has 130, which is not in"):
            layer(x)


def test_many_positions_are_looked_at_once_for_each_version(split, monkeypatch):
    _, parts, _ = split(OUT, IN, 40)
    looked = []
    monkeypatch.setattr(positions, "EACH_TIME", 10)
    monkeypatch.setattr(positions, "refuse_wrong", lambda *places: looked.append(places))
    rows, columns = parts["salient_rows"], parts["salient_columns"]
    for _ in range(3):
        positions.check_positions(rows.detach(), columns.detach(), OUT, IN)
    assert len(looked) == 1
    columns.add_(0)
    positions.check_positions(rows, columns, OUT, IN)
    positions.check_positions(rows.clone(), columns, OUT, IN)
    assert len(looked) == 3
    with torch.inference_mode():  # such tensors have no versions
        copy = rows.clone()
    for _ in range(2):
        positions.check_positions(copy, columns, OUT, IN)
    assert len(looked) == 5


def test_another_tensor_at_the_same_address_is_not_taken_for_one_that_was_seen(monkeypatch):
    monkeypatch.setattr(positions, "EACH_TIME", 0)
    rows = torch.zeros(4, dtype=torch.int32)
    memory = torch.zeros(4, dtype=torch.int32).numpy()
    positions.check_positions(rows, torch.from_numpy(memory), 1, 4)
    memory[2] = 9
    with pytest.raises(ValueError, match="salient_columns has 9, which is not in"):
        positions.check_positions(rows, torch.from_numpy(memory), 1, 4)


def test_a_look_at_few_and_a_look_at_many_find_the_same(split):
    _, parts, _ = split(OUT, IN, 40)
    few = parts["salient_rows"], parts["salient_columns"]
    positions.refuse_wrong(*few, OUT, IN)
    for kind in WRONG:
        bad = with_wrong(parts, kind)
        few = bad["salient_rows"], bad["salient_columns"]
        assert not positions._are_few_and_good(few[0].tolist(), few[1].tolist(), OUT, IN)
        with pytest.raises(ValueError, match="a salient position is out of"):
            positions.refuse_wrong(*few, OUT, IN)


def test_order_within_a_few_rows_makes_no_difference_to_the_native_library(split):
    """It looks for a stretch of some rows: within one it takes each entry as it comes, and counts them."""
    _, parts, scheme = split(8, IN, 20, group_size=32)
    flipped = {
        **parts,
        **{f"salient_{n}": parts[f"salient_{n}"].flip(0) for n in ("values", "rows", "columns")},
    }
    x, numbers = torch.randn(2, IN), (IN, scheme.grid.columns(IN))
    expected = OPS.linear(x, *StoredWeight.of(parts), None, *numbers)
    try:
        found = OPS.linear(x, *StoredWeight.of(flipped), None, *numbers)
    except ValueError as error:
        assert "out of order" in str(error)  # noqa: PT017  # where there is no such library
    else:
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", WRONG)
def test_the_dense_weight_of_a_layer_is_refused_too(kind, split):
    _, parts, scheme = split(OUT, IN, 40)
    layer = SVDQLinear(IN, OUT, scheme, bias=False)
    layer.load_parts(parts)
    layer.load_state_dict(with_wrong(parts, kind))
    with pytest.raises(ValueError, match="a salient position is out of"):
        layer.dequantize()
    with pytest.raises(ValueError, match="a salient position is out of"):
        dequantize_model(nn.Sequential(layer))
