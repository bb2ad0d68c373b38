"""Shares of the time by kind of module."""

from types import SimpleNamespace

import pytest
import torch
from tiny_models import bert, llama, mixtral
from torch import nn

from svdq_hf import SVDQConfig, quantize_model
from svdq_hf.evaluation.speed import shares as shares_module
from svdq_hf.evaluation.speed.shares import REST, kinds, shared
from svdq_hf.evaluation.speed.workload import Workload


class Clock:
    """A clock of its own: only what sleeps moves it."""

    now = 0.0

    def sleep(self, seconds):
        self.now += seconds

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(shares_module, "time", SimpleNamespace(perf_counter=clock.perf_counter))
    return clock


class Slow(nn.Module):
    def __init__(self, clock, seconds, *inside):
        super().__init__()
        self.clock, self.seconds, self.inside = clock, seconds, nn.ModuleList(inside)

    def forward(self, x):
        self.clock.sleep(self.seconds)
        for one in self.inside:
            x = one(x)
        return x


class SlowAttention(Slow):
    pass


class SlowNorm(Slow):
    pass


def test_a_module_inside_another_counts_for_its_own_kind_alone(clock):
    model = Slow(clock, 1.0, SlowAttention(clock, 1.0, SlowNorm(clock, 2.0)))
    with shared(model) as shares:
        model(torch.zeros(1))
        found = shares.of(clock.now)
    assert found == {"norms": 0.5, "attention": 0.25, REST: 0.25}
    assert list(found) == ["norms", "attention", REST]
    model(torch.zeros(1))
    assert shares.of(4.0) == found  # no hook is left


def test_what_was_before_the_beginning_does_not_count(clock):
    with shared(model := Slow(clock, 0.0, SlowNorm(clock, 1.0))) as shares:
        model(torch.zeros(1))
        shares.begin()
        assert shares.of(1.0) == {REST: 1.0}


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (lambda: quantize_model(llama(), SVDQConfig(k=4)), {"quantized layers", "head", "embedding"}),
        (lambda: quantize_model(llama(), SVDQConfig(k=4, embeddings=True)), {"embedding", "head"}),
        (bert, {"dense layers", "embedding", "attention", "norms"}),
        (lambda: quantize_model(mixtral(), SVDQConfig(k=4)), {"quantized experts", "attention", "head"}),
    ],
)
def test_the_kinds_of_models(model, expected):
    built = model()
    assert expected <= set(kinds(built).values())
    work = Workload(built)
    inputs = work.inputs(4)
    with shared(built) as shares:
        found = shares.of(work.prefill(inputs).seconds)
    assert expected <= set(found)
    assert 0 <= found[REST] < 1
