import csv
import io
import math

import pytest
from synthetic_cells import cell, overlap, write

from svdq_hf.evaluation.report.cells import Overlap, groups
from svdq_hf.evaluation.report.columns import main_table, overlap_table, runs_table
from svdq_hf.evaluation.report.read import read_cells
from svdq_hf.evaluation.report.rows import main_rows, overlap_rows
from svdq_hf.evaluation.report.tables import Entry, Table, plain


@pytest.fixture
def group_of(tmp_path):
    def make(*cells):
        [group] = groups(read_cells(write(tmp_path, list(cells))))
        return group

    return make


@pytest.fixture
def table_of(group_of):
    def make(*cells):
        group = group_of(*cells)
        return main_table(group, main_rows(group))

    return make


def shown(table: Table) -> list[dict[str, str]]:
    return [dict(zip(table.titles, (e.text for e in row), strict=True)) for row in table.entries]


def full(table: Table) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(table.csv())))


CLASSIFIED = (
    cell(correct="1111111111", loss=0.5),
    cell("none", correct="1111111110", loss=0.625, kl=0.5),
    cell("magnitude", 16, correct="1111000000"),
    cell("svd", 16, correct="0000000000", kl=0.0001234, loss=0.25),
    cell("random", 16),
)


def test_main_table_of_a_classification_says_what_was_counted(table_of):
    rows = shown(table_of(*CLASSIFIED))
    assert rows[0]["method"] == "FP32"
    assert rows[3] == {
        "method": "magnitude",
        "k": "16",
        "right of n": "4 of 10",
        "accuracy": "0.4000",
        "right, 95 % (Wilson)": "0.168 to 0.687",
        "against FP32, p": "worse, 0.031",
        "against magnitude, p": "-",
        "KL from FP32": "0.0100",
        "change of loss": "+0.0000",
        "bits per weight": "4.25",
    }
    svd = rows[2]
    assert svd["against FP32, p"] == "worse, 0.002"
    assert svd["against magnitude, p"] == "not distinguishable, 0.125"
    assert (svd["KL from FP32"], svd["change of loss"]) == ("0.000123", "-0.2500")


def test_entries_sort_as_numbers(table_of):
    table = table_of(*CLASSIFIED)
    at = table.titles.index("KL from FP32")
    assert [row[at].sort for row in table.entries] == [None, 0.5, 0.0001234, 0.01, 0.01]


def test_csv_has_every_number_in_full(table_of):
    svd = full(table_of(*CLASSIFIED))[2]
    assert (svd["method"], svd["right"], svd["n"], svd["kl"]) == ("svd", "0", "10", "0.0001234")
    assert (float(svd["p_fp32"]), svd["verdict_fp32"]) == (2 / 1024, "worse")
    assert (float(svd["p_magnitude"]), svd["verdict_magnitude"]) == (0.125, "not distinguishable")
    assert float(svd["wilson_low"]) == pytest.approx(0, abs=1e-12)
    assert svd["seeds_low"] == ""


def test_caption_says_what_is_pooled_and_how_many_tests(table_of):
    one = table_of(*CLASSIFIED)
    # none, magnitude, svd, random against FP32; svd and random against magnitude
    assert "Of 6 tests at 5%, about 0.3 would come out by chance" in one.caption
    assert "means over" not in one.caption
    both = table_of(*CLASSIFIED, *({**c, "model_seed": 1, "model": "mini-seed1"} for c in CLASSIFIED))
    assert "model seeds 0, 1; 10 examples" in both.caption
    assert "Right answers are summed; intervals and tests pool the models" in both.caption
    assert "95 % over seeds" in both.titles


def test_regression_has_no_columns_of_right_answers(table_of):
    scores = {"pearson": 0.81234, "spearmanr": 0.7}
    table = table_of(cell(correct=None, metrics=scores), cell("svd", 1, correct=None, metrics=scores))
    titles = ["method", "k", "bits per weight", "change of loss", "KL from FP32", "pearson", "spearmanr"]
    assert table.titles == titles
    assert shown(table)[1]["pearson"] == "0.8123"
    assert "McNemar" not in table.caption


def test_matthews_task_shows_both_its_score_and_its_right_answers(table_of):
    scores = {"matthews_correlation": 0.5}
    table = table_of(cell(metrics=scores), cell("svd", 1, metrics=scores))
    assert table.titles[5:8] == ["right of n", "matthews correlation", "right, 95 % (Wilson)"]


def test_perplexity_is_shown_with_its_loss_in_nats(table_of):
    table = table_of(
        cell(correct=None, metrics={"perplexity": 20.0}, loss=math.log(20)),
        cell("svd", 1, correct=None, metrics={"perplexity": 22.0}, loss=math.log(22)),
        cell("svd", 2, correct=None, metrics={"perplexity": math.inf}, loss=math.inf),
    )
    rows = shown(table)
    assert (rows[1]["perplexity"], rows[1]["change of loss (nats)"]) == ("22.0000", "+0.0953")
    assert (rows[2]["perplexity"], rows[2]["change of loss (nats)"]) == ("inf", "+inf")


def test_a_test_that_no_row_has_is_no_column(table_of):
    table = table_of(cell(), cell("svd", 1))
    assert "against FP32, p" in table.titles
    assert not any("magnitude" in title for title in table.titles)


def test_footnote_names_the_rows_that_are_missing(table_of):
    assert table_of(cell(), cell("svd", 1)).notes == [
        "No row 4-bit, nothing salient: not in the data.",
        "No row magnitude: not in the data.",
        "No row random: not in the data.",
    ]


def test_overlap_table_holds_the_papers_claim_against_the_data():
    lines = [overlap(k=16, share=0.65, iou=0.48), overlap(k=256, share=0.3), overlap(other="awq")]
    table = overlap_table(overlap_rows(Overlap(**line) for line in lines))
    assert shown(table)[1] == {
        "other score": "spqr",
        "svd's rank": "8",
        "k": "16",
        "mean share": "65.0%",
        "mean IoU": "0.480",
        "chance": "0.2%",
        "share over layers": "65.0% to 65.0%",
        "paper: 60-70 %": "hit",
        "layers": "1",
    }
    assert [row["paper: 60-70 %"] for row in shown(table)] == ["-", "hit", "miss, below"]
    assert table.notes == [
        "The paper says 60-70 % with spqr, of the mean share here: "
        "hit: k = 16 (65.0%, IoU 0.48); miss, below: k = 256 (30.0%, IoU 0.40)."
    ]
    assert float(full(table)[1]["share"]) == 0.65


def test_no_claim_without_spqr():
    assert overlap_table(overlap_rows([Overlap(**overlap(other="awq"))])).notes == []


def test_runs_are_all_there_unpooled(group_of):
    table = runs_table(group_of(cell(), cell("random", 1), cell("random", 1, score_seed=1, kl=0.5)))
    assert [(row["method"], row["draw"]) for row in shown(table)] == [
        ("fp32", "0"),
        ("random", "0"),
        ("random", "1"),
    ]
    last = full(table)[2]
    assert (last["kl"], last["seconds_quantize"], last["accuracy"]) == ("0.5", "1.0", "0.5")


def test_markdown_is_a_table_with_its_notes():
    entry = Entry("a|b", 1)
    table = Table("main", ["one", "two"], [[entry, Entry("<i>", 2)]], "A *caption*.", ["A note."])
    assert table.markdown() == (
        "| one | two |\n| --- | --- |\n| a\\|b | &lt;i> |\n\nA \\*caption\\*.\n\nA note.\n"
    )


@pytest.mark.parametrize("text", ["a\nb", "`x`", "[a](b)", "a_b_", "\\"])
def test_plain_text_cannot_break_a_row_nor_mark_up(text):
    written = plain(text)
    assert "\n" not in written
    assert all(f"\\{mark}" in written for mark in "`[]_\\" if mark in text)
