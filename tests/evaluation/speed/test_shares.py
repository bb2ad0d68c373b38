"""Shares of the time by kind of module."""

import time

import pytest
import torch
from tiny_models import FAMILIES, bert, llama
from torch import nn

from svdq_hf import SVDQConfig, quantize_model
from svdq_hf.evaluation.speed.shares import REST, kinds, shared
from svdq_hf.evaluation.speed.workload import Workload


class Slow(nn.Module):
    def __init__(self, seconds, *inside):
        super().__init__()
        self.seconds, self.inside = seconds, nn.ModuleList(inside)

    def forward(self, x):
        time.sleep(self.seconds)
        for one in self.inside:
            x = one(x)
        return x


class SlowAttention(Slow):
    pass


class SlowNorm(Slow):
    pass


def test_a_module_inside_another_counts_for_its_own_kind_alone():
    model = Slow(0.05, SlowAttention(0.05, SlowNorm(0.1)))
    with shared(model) as shares:
        started = time.perf_counter()
        model(torch.zeros(1))
        found = shares.of(time.perf_counter() - started)
    assert found == pytest.approx({"norms": 0.5, "attention": 0.25, REST: 0.25}, abs=0.2)
    assert list(found) == ["norms", "attention", REST]
    assert sum(found.values()) == pytest.approx(1)
    model(torch.zeros(1))
    assert shares.of(1.0)["norms"] < 0.2  # no hook is left


def test_what_was_before_the_beginning_does_not_count():
    with shared(model := Slow(0, SlowNorm(0.02))) as shares:
        model(torch.zeros(1))
        shares.begin()
        assert shares.of(1.0) == {REST: 1.0}


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (lambda: quantize_model(llama(), SVDQConfig(k=4)), {"quantized layers", "head", "embedding"}),
        (lambda: quantize_model(llama(), SVDQConfig(k=4, embeddings=True)), {"embedding", "head"}),
        (bert, {"dense layers", "embedding", "attention", "norms"}),
        (FAMILIES["mixtral"].build, {"attention", "head"}) if "mixtral" in FAMILIES else (bert, set()),
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
