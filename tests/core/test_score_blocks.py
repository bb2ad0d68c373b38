"""Scores by blocks of rows: those of the whole weight, and the same choice."""

import pytest
import torch

from svdq_hf.core import saliency
from svdq_hf.core.grid import Grid
from svdq_hf.core.normalized import NormalizedWeight
from svdq_hf.core.rounding import WORKING_SET
from svdq_hf.core.score_blocks import BY_ROWS, score_blocks
from svdq_hf.core.svd import principal
from svdq_hf.core.topk import top_of_blocks, top_positions

OUT, IN = 600, 2 * WORKING_SET // 600  # two blocks and a bit


@pytest.fixture
def weight():
    dense = torch.randn(OUT, IN) * torch.randn(IN).exp()
    return NormalizedWeight(dense, Grid(column_scale=True))


def inputs():
    return {"rank": 8, "seed": 0, "group": 64, "input_norm": torch.linspace(0.1, 2, IN)}


@pytest.mark.parametrize("name", [*BY_ROWS, "svd"])
def test_scores_by_blocks_are_those_of_the_whole_weight(name, weight):
    seen = weight.dense if saliency.data_needs(name) else weight.normalized
    whole = saliency.score(name, seen, inputs())
    blocks = score_blocks(name, weight, inputs())
    found = torch.cat([block for _, block in blocks.of(OUT, IN)])
    torch.testing.assert_close(found, whole.scores, rtol=1e-3, atol=1e-4 * float(whole.scores.max()))
    assert blocks.facts.keys() == whole.facts.keys()
    chosen, expected = top_of_blocks(blocks.of(OUT, IN), IN, 500), top_positions(whole.scores, 500)
    mine, theirs = ({*zip(*map(torch.Tensor.tolist, each), strict=True)} for each in (chosen, expected))
    assert len(mine & theirs) >= 0.99 * len(mine | theirs)


def test_the_choice_by_blocks_is_exact_given_the_scores(weight):
    blocks = score_blocks("relative", weight, inputs())
    whole = torch.cat([block for _, block in blocks.of(OUT, IN)])
    for k in (1, 300, 20_000):
        for found, expected in zip(
            top_of_blocks(blocks.of(OUT, IN), IN, k), top_positions(whole, k), strict=True
        ):
            assert torch.equal(found, expected)


def test_a_score_of_the_whole_and_a_users_have_no_blocks(weight, monkeypatch):
    assert score_blocks("random", weight, inputs()) is None
    monkeypatch.setitem(saliency._SCORES, "magnitude", lambda weight: weight.abs())
    assert score_blocks("magnitude", weight, inputs()) is None


def test_a_score_without_its_data_is_refused(weight):
    with pytest.raises(ValueError, match="'awq' needs"):
        score_blocks("awq", weight, {})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(400, 500), (500, 400)], ids=str)
def test_the_structure_under_a_column_scale_is_that_of_the_divided_weight(shape, dtype):
    weight, scale = torch.randn(shape).to(dtype), torch.rand(shape[1]) + 0.5
    found, expected = principal(weight, 8, column_scale=scale), principal(weight.float() / scale, 8)
    torch.testing.assert_close(found.s, expected.s, rtol=1e-4, atol=0)
    torch.testing.assert_close(found.matrix().abs(), expected.matrix().abs(), rtol=0, atol=0.02)


def test_a_very_tall_matrix_keeps_no_images_and_has_the_same_structure(monkeypatch):
    weight = torch.randn(900, 320)
    expected = principal(weight, 8)
    monkeypatch.setattr("svdq_hf.core.svd.MOST_IMAGES", 0)
    monkeypatch.setattr("svdq_hf.core.svd.BLOCK_WEIGHTS", 320 * 100)
    torch.testing.assert_close(principal(weight, 8).s, expected.s, rtol=1e-5, atol=0)
