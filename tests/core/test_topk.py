import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from svdq_hf.core.grid import Grid
from svdq_hf.core.normalized import NormalizedWeight
from svdq_hf.core.topk import salient_count, top_positions

SHAPES = st.tuples(st.integers(1, 8), st.integers(1, 12))
FEW_VALUES = st.sampled_from([-np.inf, -1.0, 0.0, 0.5, 2.0, np.inf])  # few, so that most are ties
SCORES = arrays(np.float32, SHAPES, elements=FEW_VALUES).map(torch.from_numpy)


def by_stable_sort(scores, k):
    """Positions of the k highest, the first among equals first, in reading order."""
    flat = scores.cpu().numpy().reshape(-1)
    chosen = np.sort(np.argsort(-flat, kind="stable")[:k])
    return divmod(chosen, scores.shape[1])


def assert_same_choice(scores, k):
    rows, columns = top_positions(scores, k)
    assert rows.dtype == columns.dtype == torch.int32
    expected_rows, expected_columns = by_stable_sort(scores, k)
    assert rows.tolist() == expected_rows.tolist()
    assert columns.tolist() == expected_columns.tolist()


@given(SCORES, st.data())
def test_top_positions_is_a_stable_sort_ties_included(scores, data):
    assert_same_choice(scores, data.draw(st.integers(0, scores.numel())))


@given(SCORES, st.data())
def test_positions_are_sorted_by_row_then_column_and_distinct(scores, data):
    rows, columns = top_positions(scores, data.draw(st.integers(0, scores.numel())))
    order = rows.long() * scores.shape[1] + columns
    assert (order[1:] > order[:-1]).all()


# More entries than the sample that guesses the threshold takes (65536): each case has its own way
# to make the guess too high, too low or a tie.
NUMEL = 600 * 400
LARGE = {
    "random": lambda: torch.rand(NUMEL),
    "all equal": lambda: torch.ones(NUMEL),
    "rising": lambda: torch.arange(NUMEL).float(),
    "falling": lambda: -torch.arange(NUMEL).float(),
    "sampled entries are high": lambda: 1 + (torch.arange(NUMEL) % (NUMEL // 65536) == 0) * torch.rand(NUMEL),
    "sampled entries are low": lambda: (torch.arange(NUMEL) % (NUMEL // 65536) != 0) * torch.rand(NUMEL),
    "few values": lambda: torch.randint(0, 4, (NUMEL,)).float(),
    "one infinity": lambda: torch.zeros(NUMEL).index_fill_(0, torch.tensor([77]), torch.inf),
}


@pytest.mark.parametrize("k", [0, 1, 256, 100_000, NUMEL])
@pytest.mark.parametrize("kind", LARGE)
def test_large_matrices_too(kind, k, device):
    assert_same_choice(LARGE[kind]().view(600, 400).to(device), k)


def test_integer_scores_and_transposed_layouts_are_read_in_reading_order():
    assert_same_choice(torch.tensor([[1, 3, 3], [3, 0, 2]]), 2)
    assert_same_choice(torch.randint(0, 3, (7, 5)).float().T, 9)


def test_a_nan_score_is_refused():
    with pytest.raises(ValueError, match="a score is NaN"):
        top_positions(torch.tensor([[1.0, float("nan")]]), 1)


@pytest.mark.parametrize(
    ("k", "shape", "count"),
    [
        (0, (4, 5), 0),
        (1, (4, 5), 1),
        (20, (4, 5), 20),
        (21, (4, 5), 20),
        (10**12, (4, 5), 20),
        (0.5, (4, 5), 10),
        (0.01, (100, 50), 50),
        (0.001, (4, 5), 0),  # a share that rounds to nothing
        (0.99, (4, 5), 20),  # 19.8, rounded
    ],
)
def test_salient_count(k, shape, count):
    assert salient_count(k, *shape) == count


@pytest.mark.parametrize("column_scale", [False, True])
@given(scores=SCORES, data=st.data())
def test_a_weight_without_its_salient_entries_leaves_the_weight_as_it_is(column_scale, scores, data):
    weight = NormalizedWeight(torch.randn(scores.shape), Grid(column_scale=column_scale))
    before = weight.dense.clone()
    rows, columns = top_positions(scores, data.draw(st.integers(0, scores.numel())))
    rest = weight.without(rows, columns)
    assert (rest[rows.long(), columns.long()] == 0).all()
    rest[rows.long(), columns.long()] = weight.normalized[rows.long(), columns.long()]
    assert torch.equal(rest, weight.normalized)
    assert torch.equal(weight.dense, before)
