import pytest
from synthetic_cells import cell, write

from svdq_hf.evaluation.report.cells import groups
from svdq_hf.evaluation.report.columns import main_table
from svdq_hf.evaluation.report.read import read_cells
from svdq_hf.evaluation.report.report import write_report
from svdq_hf.evaluation.report.rows import main_rows
from svdq_hf.evaluation.report.summary import sentences

NEAR, FAR = [0.1, 0.1, 0.1, 0.2] * 3, [0.3, 0.2, 0.4, 0.3] * 3
ALL, HALF, NONE = "1" * 10, "1" * 5 + "0" * 5, "0" * 10


@pytest.fixture
def said(tmp_path):
    def make(*cells):
        [group] = groups(read_cells(write(tmp_path, list(cells))))
        return sentences(group, main_rows(group))

    return make


def test_everything_the_numbers_say(said):
    assert said(
        cell(correct=ALL),
        cell("none", correct=NONE, kl=0.5),
        cell("svd", 1, correct=ALL, kl=0.2),
        cell("svd", 16, correct=NONE, kl=0.1),
        cell("magnitude", 1, correct=NONE, kl=0.3),
        cell("magnitude", 16, correct=ALL, kl=0.05),
        cell("awq", 16, correct=HALF, kl=0.07),
    ) == [
        "Closest to FP32, by KL of the outputs: svd at k = 1 and magnitude at k = 16. "
        "The smallest KL is 0.0500 (magnitude at k = 16); with nothing salient it is 0.500.",
        "By right answers, 3 of 6 rows are not distinguishable from FP32; "
        "worse: 4-bit, nothing salient, magnitude at k = 1 and svd at k = 16.",
        "By right answers, svd at k = 1 is better than magnitude; svd at k = 16 is worse than magnitude.",
        "The paper has svd ahead of awq at high k; here at k = 16 that is open: "
        "0 to 5 right of 10, not distinguishable, p 0.062.",
    ]


@pytest.mark.parametrize(
    ("svd", "spqr", "word"), [(ALL, NONE, "holds"), (NONE, ALL, "does not hold"), (ALL, ALL, "is open")]
)
def test_the_papers_claim_is_judged_by_the_test_alone(said, svd, spqr, word):
    last = said(cell("svd", 16, correct=svd), cell("spqr", 16, correct=spqr))[-1]
    assert f"svd ahead of spqr at high k; here at k = 16 that {word}:" in last


@pytest.mark.parametrize(
    ("svd", "words"),
    [
        (NEAR, "closer to FP32 than"),
        ([*FAR[1:], 0.3], "not distinguishable from"),
        ([1 + kl for kl in FAR], "farther from FP32 than"),
    ],
)
def test_kls_are_compared_example_by_example(said, svd, words):
    each = {"svd": svd, "magnitude": FAR}
    cells = [cell(m, k, kl_each=each[m], correct="1" * 12) for m in each for k in (1, 16)]
    assert f"By KL, svd at every k is {words} magnitude." in said(*cells)


def test_what_the_data_cannot_answer_is_left_out(said):
    assert said(cell()) == []
    assert said(cell(correct=None), cell("svd", 1, correct=None)) == []


def test_a_kl_that_is_nan_never_wins(said):
    first = said(cell("svd", 1, kl=float("nan")), cell("magnitude", 1, kl=0.5))[0]
    assert first.startswith("Closest to FP32, by KL of the outputs: magnitude at k = 1.")


TEXT = {"correct": None, "metrics": {"perplexity": 20.0}, "n": 1000, "task": "perplexity, context 64"}


def test_perplexity_has_a_verdict_with_what_the_best_and_the_plain_row_cost(said):
    first, *_ = said(
        cell(**TEXT, loss=3.0),
        cell("none", **TEXT, loss=3.2, kl=0.2),
        cell("svd", 16, **TEXT, loss=3.04, kl=0.05),
        cell("magnitude", 16, **TEXT, loss=3.1, kl=0.1),
    )
    assert first == (
        "Verdict, over 1000 tokens: svd at k = 16, 4.25 bits: perplexity 20.00 to 20.82 (+4.1%, little); "
        "4-bit, nothing salient, 4.25 bits: perplexity 20.00 to 24.43 (+22.1%, much)."
    )


def test_every_preset_has_its_verdict_and_nothing_is_missed(said, tmp_path):
    presets = [
        cell("best", 0.0018, **TEXT, grid="presets", loss=3.005, kl=0.01),
        cell("small", 0.0009, **TEXT, grid="presets", loss=2.99, kl=0.02),
    ]
    first, *_ = said(cell(**TEXT, loss=3.0), *presets)
    assert "tokens: best, 4.25 bits: perplexity 20.00 to 20.10 (+0.5%, next to nothing); small, 4.25" in first
    assert first.endswith("small, 4.25 bits: perplexity 20.00 to 19.80 (-1.0%).")
    [group] = groups(read_cells(tmp_path))
    table = main_table(group, main_rows(group))
    assert table.notes == []
    assert "1000 tokens" in table.caption
    assert write_report(tmp_path)
    assert list((tmp_path / "pictures").iterdir()) == []


def test_a_quantized_folder_has_a_section_of_its_own_with_its_config(tmp_path):
    stored = cell("as stored", 4, **TEXT, grid="as stored: bits=4, k=4", kl=None)
    write_report(write(tmp_path, [stored]))
    page = (tmp_path / "report.html").read_text()
    assert "perplexity, context 64, mini, as stored: bits=4, k=4" in page
    assert "No row FP32: not in the data." in page
