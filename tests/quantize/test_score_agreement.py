import pytest
import torch
from tiny_models import llama, tokens

from svdq_hf import SVDQConfig
from svdq_hf.quantize import score_agreement as home
from svdq_hf.quantize.score_agreement import FISHER, SCORES, TAYLOR, rank_correlation, score_agreement
from svdq_hf.quantize.sensitivity import linear


@pytest.fixture(scope="module")
def given():
    return [{"input_ids": tokens(4, 20)} for _ in range(2)]


def agreement(given, **choices):
    model, config = llama(), SVDQConfig(**choices)
    return {row.name: row for row in score_agreement(model, linear(model, config), config, given)}


def test_every_score_beside_pqi(given):
    found = agreement(given)
    assert found.keys() == {TAYLOR, FISHER, *SCORES}
    assert all(0 <= row.overlap <= 1 and -1 <= row.correlation <= 1 for row in found.values())
    assert found["random"].overlap < 0.1
    assert abs(found["random"].correlation) < 0.02
    assert found[TAYLOR].overlap > 0.3 > found["magnitude"].overlap
    overlaps = [row.overlap for row in found.values()]
    assert overlaps == sorted(overlaps, reverse=True)


def test_a_score_agrees_with_itself(given, monkeypatch):
    model = llama()
    sizes = {name: one.weight.detach().abs() for name, one in linear(model, SVDQConfig()).items()}
    monkeypatch.setattr(home, "pqi", lambda *arguments: sizes)
    found = agreement(given, column_scale=False)["magnitude"]
    assert found.overlap == 1
    assert found.correlation == pytest.approx(1)
    scaled = agreement(given)["magnitude"]  # it sees the matrix without its column scale
    assert 0.5 < scaled.overlap < 1
    assert 0.9 < scaled.correlation < 1


def test_batches_are_run_again_where_gram_matrices_would_be_large(given, monkeypatch):
    whole = agreement(given)
    runs = []
    own = home.collect_inputs
    monkeypatch.setattr(home, "GRAMS", 2 * 64 * 64)
    monkeypatch.setattr(
        home, "collect_inputs", lambda *args, **choices: runs.append(list(args[1])) or own(*args, **choices)
    )
    assert agreement(given) == whole
    assert len(runs) > 3
    assert [name for run in runs for name in run] == list(linear(llama(), SVDQConfig()))


def test_ranks_by_hand():
    a, b = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([10.0, 30.0, 20.0])
    assert rank_correlation(a, b) == pytest.approx(0.5)
    assert rank_correlation(a, -a) == pytest.approx(-1)
    assert rank_correlation(a[:1], b[:1]) == 0
