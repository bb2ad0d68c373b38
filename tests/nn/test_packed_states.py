"""Packed states of a layer: what is dense and what is packed, and what happens to both."""

import pytest
import torch
from torch import Tensor

from svdq_hf.core.state_codes import StateFormat
from svdq_hf.nn.packed_states import BLOCK, PackedStates

FORMS = [StateFormat(8), StateFormat(4), StateFormat(4, outliers=True)]
TOKENS = 150


def tokens(count: int = TOKENS) -> Tensor:
    made = torch.randn(2, 3, count, 64, generator=torch.Generator().manual_seed(0))
    made[..., 11] *= 25
    return made


def filled(form: StateFormat, recent: int, *pieces: Tensor) -> PackedStates:
    states = PackedStates(form, recent)
    for piece in pieces:
        states.append(piece)
        states.pack()
    return states


@pytest.mark.parametrize("recent", [0, 5, 32, 200])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_recent_tokens_are_as_they_came_and_the_others_near(form, recent):
    came = tokens()
    states = filled(form, recent, came)
    packed = max((TOKENS - recent) // BLOCK * BLOCK, 0)
    dense = states.dense()
    assert len(states) == TOKENS
    assert torch.equal(dense[:, :, packed:], came[:, :, packed:])
    assert (states.packed is None) == (packed == 0)
    assert (dense - came).norm() < 0.1 * came.norm()
    if packed:
        assert states.packed.shape == (2, 3, packed, form.row_bytes(64))
        assert not torch.equal(dense, came)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_pieces_give_the_bytes_of_one(form):
    """What is packed depends neither on who came with a token nor on when it was read."""
    whole = filled(form, 16, tokens())
    one_by_one = filled(form, 16, *tokens().split(1, -2))
    uneven = filled(form, 16, *tokens().split([70, 1, 30, 49], -2))
    for other in (one_by_one, uneven):
        assert torch.equal(other.packed, whole.packed)
        assert torch.equal(other.recent_states, whole.recent_states)
        assert torch.equal(other.dense(), whole.dense())


@pytest.mark.parametrize(
    ("first", "stop"), [(0, 150), (0, 140), (0, 100), (0, 1), (40, 150), (7, 97), (130, 150)]
)
def test_keeping_some_is_that_of_the_dense_tokens(first, stop):
    states = filled(StateFormat(4, outliers=True), 20, tokens())
    dense = states.dense()
    states.keep(first, stop)
    assert len(states) == stop - first
    assert torch.equal(states.dense(), dense[:, :, first:stop])
    states.append(tokens(90))
    states.pack()
    assert len(states) == stop - first + 90
    packed_before = min(max(stop, first), 128) - min(first, 128)
    assert torch.equal(states.dense()[:, :, :packed_before], dense[:, :, first : first + packed_before])


def test_nothing_kept_and_nothing_come():
    states = filled(StateFormat(4), 0, tokens())
    states.keep(0, 0)
    assert len(states) == 0
    assert states.dense().shape == (2, 3, 0, 64)
    states.clear()
    with pytest.raises(ValueError, match="nothing has been cached yet"):
        states.dense()


@pytest.mark.parametrize(("first", "stop"), [(0, 40), (110, 150), (0, 1), (149, 150)])
def test_what_is_dropped_is_freed(first, stop):
    """Views of a few tokens would hold on to the storage of all."""
    states = filled(StateFormat(4, outliers=True), 20, tokens())
    states.keep(first, stop)
    parts = [part for part in (states.packed, states.recent_states) if part is not None]
    needed = sum(part.numel() * part.element_size() for part in parts)
    assert needed <= states.nbytes <= 2 * needed


def test_another_text_after_the_last_token_chooses_its_own_outlier_channels():
    form, other = StateFormat(4, outliers=True), tokens().flip(-1)
    states = filled(form, 20, tokens())
    states.keep(0, 0)
    assert states.nbytes == 0
    states.append(other)
    states.pack()
    fresh = filled(form, 20, other)
    assert torch.equal(states.channels, fresh.channels)
    assert torch.equal(states.dense(), fresh.dense())


def test_each_changes_packed_and_recent_alike():
    states = filled(StateFormat(4, outliers=True), 10, tokens())
    dense = states.dense()
    order = torch.tensor([1, 1, 0])
    states.each(lambda held: held.index_select(0, order))
    assert torch.equal(states.dense(), dense.index_select(0, order))


def test_bytes_held_are_those_of_the_codes_and_of_the_recent():
    form = StateFormat(4, outliers=True)
    states = filled(form, 20, *tokens().bfloat16().split(10, -2))
    assert states.nbytes == 2 * 3 * (128 * 39 + 22 * 64 * 2)


@pytest.mark.parametrize(
    ("form", "value", "said"),
    [
        (StateFormat(4), float("nan"), "keys that are NaN or infinite .*bfloat16 or .*came in float32"),
        (StateFormat(4, outliers=True), float("inf"), "keys that are NaN or infinite .*DynamicCache"),
        (StateFormat(2), 1e6, r"keys as large as 1e\+06 cannot be packed in 2 bits: take bits=8 or"),
        (StateFormat(8), 1e9, r"keys as large as 1e\+09 cannot be packed in 8 bits: take a DynamicCache"),
    ],
)
def test_states_that_cannot_be_packed_are_refused_and_nothing_is_lost(form, value, said):
    came = tokens(64)
    came[0, 1, 40, 5] = value
    states = PackedStates(form, 0, "keys")
    states.append(came)
    with pytest.raises(ValueError, match=said):
        states.pack()
    assert torch.equal(states.dense().nan_to_num(7), came.nan_to_num(7))
    states.keep(0, 35)
    states.pack()
    assert states.packed.shape[-2] == BLOCK
