"""Threads of torch while a matrix is quantized: how many, and that they are set back."""

from itertools import count

import pytest
import torch

from svdq_hf import SVDQConfig
from svdq_hf.quantize import threads, weight
from svdq_hf.quantize.threads import SMALL, more_help, threads_for


@pytest.fixture(autouse=True)
def two_threads():
    torch.set_num_threads(2)
    threads._answers.clear()
    yield
    torch.set_num_threads(1)
    threads._answers.clear()


def test_a_small_matrix_takes_one_thread_and_an_error_sets_them_back():
    with threads_for(SMALL - 1):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2
    with pytest.raises(KeyError), threads_for(4):
        raise KeyError
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(("helps", "taken"), [(True, 2), (False, 1)])
def test_a_large_matrix_takes_all_where_they_help(monkeypatch, helps, taken):
    monkeypatch.setattr(threads, "more_help", lambda many: helps)
    with threads_for(SMALL):
        assert torch.get_num_threads() == taken
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(("seconds", "expected"), [((3.0, 2.0), True), ((2.0, 3.0), False)])
def test_more_help_where_they_are_faster_and_the_answer_is_kept_a_while(monkeypatch, seconds, expected):
    times, seen = iter(seconds), []

    def timed(numbers):
        seen.append(torch.get_num_threads())
        return next(times)

    monkeypatch.setattr(threads, "seconds_of_steps", timed)
    monkeypatch.setattr(threads.time, "monotonic", count(0.0, threads.KEPT / 4).__next__)
    assert more_help(2) is expected
    assert more_help(2) is expected  # asked once
    assert seen == [1, 2]
    assert torch.get_num_threads() == 2


def test_a_weight_is_quantized_on_one_thread_and_stored_alike(monkeypatch):
    seen = []
    choose = weight.choose
    monkeypatch.setattr(
        weight, "choose", lambda *given: (seen.append(torch.get_num_threads()), choose(*given))[1]
    )
    dense = torch.randn(64, 96)
    two, _ = weight.quantize_weight(dense, SVDQConfig(k=4), "fc")
    torch.set_num_threads(1)
    one, _ = weight.quantize_weight(dense, SVDQConfig(k=4), "fc")
    assert seen == [1, 1]
    assert all(torch.equal(two[name], one[name]) for name in one)
