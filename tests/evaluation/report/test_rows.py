import math

import pytest
from scipy import stats
from synthetic_cells import cell, overlap, write

from svdq_hf.evaluation.report.cells import Overlap, groups
from svdq_hf.evaluation.report.read import read_cells
from svdq_hf.evaluation.report.rows import caveat, main_rows, missing, overlap_rows
from svdq_hf.evaluation.report.summary import sentences


@pytest.fixture
def rows_of(tmp_path):
    """Rows, by method and k, of one group of cells."""

    def make(*cells):
        [group] = groups(read_cells(write(tmp_path, list(cells))))
        rows = main_rows(group)
        return {(row.method, row.k): row for row in rows}, missing(group, rows)

    return make


def test_one_model_by_hand(rows_of):
    rows, _ = rows_of(
        cell(correct="1111111111", loss=0.5),
        cell("magnitude", 16, correct="1111000000", kl=0.3, loss=0.9),
        cell("svd", 16, correct="0000000000", kl=0.1, loss=0.75, bits_per_weight=4.5),
    )
    svd = rows["svd", 16]
    assert (svd.right, svd.n, svd.kl, svd.loss_change, svd.bits_per_weight) == (0, 10, 0.1, 0.25, 4.5)
    assert svd.scores == {"accuracy": 0.0}
    assert svd.against_fp32 == (2 / 2**10, 0, 10, 10, "worse")
    assert svd.against_magnitude == (2 / 2**4, 0, 4, 10, "not distinguishable")
    assert svd.interval == pytest.approx(stats.binomtest(0, 10).proportion_ci(method="wilson"))
    assert svd.band is None
    dense = rows["fp32", 0]
    assert (dense.against_fp32, dense.against_magnitude, dense.loss_change) == (None, None, None)
    assert rows["magnitude", 16].against_magnitude is None


def test_models_are_summed_averaged_and_paired_with_their_own_fp32(rows_of):
    rows, _ = rows_of(
        cell(correct="1111100000", loss=0.5),
        cell(correct="0000011111", loss=0.7, model_seed=1),
        cell("svd", 16, correct="0111100000", loss=0.6, kl=0.01),
        cell("svd", 16, correct="0000000111", loss=1.0, kl=0.03, model_seed=1),
    )
    svd = rows["svd", 16]
    assert (svd.right, svd.n, svd.runs, svd.seeds) == (7, 20, 2, 2)
    assert svd.scores["accuracy"] == pytest.approx(0.35)
    assert svd.kl == pytest.approx(0.02)
    assert svd.loss_change == pytest.approx((0.1 + 0.3) / 2)
    # 3 discordant pairs, all for FP32: unpaired models would give 9
    assert svd.against_fp32 == (2 / 2**3, 7, 10, 20, "not distinguishable")
    half = stats.t.ppf(0.975, 1) * 0.05  # two values 0.4 and 0.3: standard error 0.05
    assert svd.band == pytest.approx((0.35, 0.35 - half, 0.35 + half))


def test_draws_of_one_model_are_summed_but_tested_once(rows_of):
    draws = ["1111000000", "0000000000", "1100000000"]
    rows, _ = rows_of(
        cell(correct="1111111111"), *(cell("random", 4, score_seed=i, correct=c) for i, c in enumerate(draws))
    )
    random = rows["random", 4]
    assert (random.right, random.n, random.runs, random.seeds) == (6, 30, 3, 1)
    assert random.against_fp32 == (2 / 2**6, 4, 10, 10, "worse")
    assert random.interval == pytest.approx(stats.binomtest(2, 10).proportion_ci(method="wilson"))
    assert random.band is not None
    assert random.band.mean == pytest.approx(0.2)


def test_order_is_baselines_then_k_then_method(rows_of):
    rows, _ = rows_of(
        *(cell(method, k) for k in (16, 1) for method in ("random", "mine", "magnitude", "svd")),
        cell("none"),
        cell(),
    )
    methods = ("svd", "magnitude", "mine", "random")
    assert list(rows) == [("fp32", 0), ("none", 0), *((m, k) for k in (1, 16) for m in methods)]


def test_ranks_are_told_apart_where_there_are_several(rows_of, tmp_path):
    rows, _ = rows_of(cell("svd", 1), cell("magnitude", 1))
    assert rows["svd", 1].label == "svd"
    [group] = groups(read_cells(write(tmp_path, [cell("svd", 1), cell("svd", 1, rank=64)])))
    assert [row.label for row in main_rows(group)] == ["svd, rank 8", "svd, rank 64"]


def test_regression_has_no_right_answers(rows_of):
    scores = {"pearson": 0.8, "spearmanr": 0.7}
    rows, _ = rows_of(cell(correct=None), cell("svd", 1, correct=None, metrics=scores))
    svd = rows["svd", 1]
    assert (svd.right, svd.interval, svd.against_fp32) == (None, None, None)
    assert svd.scores == scores


def test_numbers_that_are_none_or_not_finite_pass_through(rows_of):
    rows, _ = rows_of(
        cell(correct=None, metrics={"perplexity": 20.0}, loss=None),
        *(
            cell("svd", 1, correct=None, metrics={"perplexity": math.inf}, kl=math.nan, model_seed=seed)
            for seed in (0, 1)
        ),
    )
    svd = rows["svd", 1]
    assert svd.scores["perplexity"] == math.inf
    assert math.isnan(svd.kl)
    assert (svd.loss_change, svd.band) == (None, None)


def test_missing_rows_and_models_are_named(rows_of):
    _, notes = rows_of(
        cell(),
        cell(model_seed=1),
        *(cell("svd", k, model_seed=seed) for k in (1, 16) for seed in (0, 1)),
        cell("magnitude", 16),
    )
    assert notes == [
        "No row 4-bit, nothing salient: not in the data.",
        "No row random: not in the data.",
        "No row magnitude at k = 1: not in the data.",
        "magnitude at k = 16 has 1 of 2 models.",
    ]


def test_nothing_is_missing_from_a_whole_grid(rows_of):
    _, notes = rows_of(cell(), cell("none"), *(cell(m, 1) for m in ("svd", "magnitude", "random")))
    assert notes == []


def test_overlaps_by_hand():
    lines = [
        overlap("a", 16, share=0.5, iou=0.2),
        overlap("b", 16, share=0.8, iou=0.4),
        overlap("a", 1, share=1.0),
        overlap("a", 4, share=0.1),
        overlap("a", 16, "magnitude", share=0.65),
    ]
    rows = overlap_rows(Overlap(**line) for line in lines)
    assert [(row.other, row.k, row.claim) for row in rows] == [
        ("magnitude", 16, None),
        ("spqr", 1, "miss, above"),
        ("spqr", 4, "miss, below"),
        ("spqr", 16, "hit"),
    ]
    last = rows[-1]
    assert (last.share, last.iou, last.chance) == pytest.approx((0.65, 0.3, 0.002))
    assert (last.low, last.high, last.layers) == (0.5, 0.8, 2)


def test_kl_is_compared_with_magnitude_example_by_example(tmp_path):
    near, far = [0.1, 0.2, 0.3, 0.2] * 3, [0.2, 0.3, 0.5, 0.3] * 3
    each = {"svd": near, "magnitude": far}
    cells = [cell(name, 16, kl_each=kls, correct="1" * 12) for name, kls in each.items()]
    [group] = groups(read_cells(write(tmp_path, cells)))
    svd = next(row for row in main_rows(group) if row.method == "svd")
    found = svd.kl_against_magnitude
    assert (found.n, found.verdict) == (12, "better")
    assert (found.kl, found.other_kl) == pytest.approx((0.2, 0.325))
    record = svd.record()
    assert (record["p_kl_magnitude"], record["verdict_kl_magnitude"]) == (found.p, "better")


@pytest.mark.parametrize(("right", "majority", "noted"), [(6, 5, True), (55, 50, True), (90, 50, False)])
def test_base_model_near_the_commonest_answer_is_told(tmp_path, right, majority, noted):
    n = 10 if right < 10 else 100
    cells = [cell(correct="1" * right + "0" * (n - right), majority=majority)]
    [group] = groups(read_cells(write(tmp_path, cells)))
    found = caveat(main_rows(group))
    assert (found is not None and "always giving the commonest answer" in found) is noted
    first = sentences(group, main_rows(group))[:1]
    assert first == ([found] if noted else [])  # before all that is said of methods
