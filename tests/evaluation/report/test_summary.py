import pytest
from synthetic_cells import cell, write

from svdq_hf.evaluation.report.cells import groups
from svdq_hf.evaluation.report.read import read_cells
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
