import json
import math

import pytest
from synthetic_cells import cell, overlap, write

from svdq_hf.evaluation.report.cells import family, groups
from svdq_hf.evaluation.report.read import read_cells, read_overlaps


def test_a_cell_is_read_as_written(tmp_path):
    [read] = read_cells(write(tmp_path, [cell("svd", 256, kl=0.25, correct="110")]))
    assert (read.method, read.k, read.kl, read.right, read.n, read.correct) == ("svd", 256, 0.25, 2, 3, "110")
    assert read.metrics == {"accuracy": 2 / 3}
    assert read.family == "mini"


def test_last_of_two_equal_cells_wins(tmp_path):
    folder = write(tmp_path, [cell("svd", 1, kl=0.1), cell("svd", 16), cell("svd", 1, kl=0.2)])
    assert [(one.k, one.kl) for one in read_cells(folder)] == [(1, 0.2), (16, 0.01)]


@pytest.mark.parametrize(
    "change", [{"score_seed": 1}, {"rank": 16}, {"model": "b"}, {"grid": "row"}, {"task": "b"}]
)
def test_cells_that_differ_are_two(tmp_path, change):
    assert len(read_cells(write(tmp_path, [cell("svd", 1), cell("svd", 1, **change)]))) == 2


def test_ranks_of_one_method_are_cells_of_their_own(tmp_path):
    cells = [
        cell(),
        cell("awq", 1),
        *(cell("svd", 1, rank=rank) for rank in (8, 64, 8)),
    ]
    assert [(one.method, one.rank) for one in read_cells(write(tmp_path, cells))] == [
        ("fp32", None), ("awq", None), ("svd", 8), ("svd", 64)
    ]  # fmt: skip


@pytest.mark.parametrize("kept", [1, 20, -2])
def test_last_line_cut_off_by_a_kill_is_passed_over(tmp_path, kept):
    file = write(tmp_path, [cell("svd", 1)]) / "cells.jsonl"
    with file.open("a") as opened:
        opened.write(json.dumps(cell("svd", 16))[:kept])
    assert [one.k for one in read_cells(tmp_path)] == [1]


def test_broken_line_before_the_last_is_an_error_that_names_it(tmp_path):
    file = write(tmp_path, [cell("svd", 1)]) / "cells.jsonl"
    file.write_text('{"task": "r\n' + file.read_text())
    with pytest.raises(ValueError, match=r"cells\.jsonl, line 1 is not JSON: .*delete it"):
        read_cells(tmp_path)


@pytest.mark.parametrize("lines", [None, []], ids=["no file", "no line"])
def test_empty_folder_says_how_to_make_cells(tmp_path, lines):
    if lines is not None:
        write(tmp_path, lines)
    with pytest.raises(ValueError, match=r"no finished cell in cells\.jsonl; make some with `svdq evaluate"):
        read_cells(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": 3}, "'task' must be text, not 3"),
        ({"k": "many"}, "'k' must be a number, not 'many'"),
        ({"k": math.nan}, "k is nan"),
        ({"n": True}, "'n' must be a whole number, not True"),
        ({"right": 11}, "11 right of 10"),
        ({"right": 4}, "does not hold 10 answers with 4 right"),
        ({"n": 11}, "does not hold 11 answers"),
        ({"correct": "yes"}, "'correct' must be 0s and 1s, or null"),
        ({"metrics": {}}, "'metrics' must be an object of at least one number"),
        ({"relative_error": {"a": "b"}}, "'relative_error' must be an object of numbers, or null"),
    ],
)
def test_what_is_not_a_cell_is_named(tmp_path, change, message):
    with pytest.raises(ValueError, match=message) as caught:
        read_cells(write(tmp_path, [cell("svd", 1), {**cell("svd", 16), **change}]))
    assert "cells.jsonl, line 2" in str(caught.value)


def test_missing_key_is_named(tmp_path):
    broken = cell("svd", 1)
    del broken["kl"]  # may be null, so may be absent
    assert read_cells(write(tmp_path / "a", [broken]))[0].kl is None
    del broken["n"]
    with pytest.raises(ValueError, match="line 1: the key 'n' is missing"):
        read_cells(write(tmp_path, [broken]))


def test_overlaps_are_read_once_and_may_be_absent(tmp_path):
    assert read_overlaps(write(tmp_path / "a", [cell()])) == []
    read = read_overlaps(write(tmp_path / "b", [cell()], [overlap(share=0.1), overlap(share=0.2)]))
    assert [one.share for one in read] == [0.2]


def test_groups_are_by_task_kind_of_model_and_grid_with_fp32_in_each(tmp_path):
    cells = [
        cell(),
        cell("svd", 1),
        cell("svd", 1, model_seed=1),
        cell("svd", 1, grid="tensor, absmax"),
        cell("svd", 1, model="other"),
    ]
    found = groups(read_cells(write(tmp_path, cells)))
    assert [(one.family, one.grid, [c.method for c in one.cells]) for one in found] == [
        ("mini", "group 64, mse", ["fp32", "svd", "svd"]),
        ("mini", "tensor, absmax", ["fp32", "svd"]),
        ("other", "group 64, mse", ["svd"]),
    ]


def test_fp32_alone_is_a_group(tmp_path):
    [group] = groups(read_cells(write(tmp_path, [cell()])))
    assert (group.grid, group.ks, group.methods) == (None, [], ["fp32"])


def test_cells_over_other_examples_cannot_share_a_group(tmp_path):
    with pytest.raises(ValueError, match=r"cells over \[2, 10\] examples cannot share a table"):
        groups(read_cells(write(tmp_path, [cell(), cell("svd", 1, correct="10")])))


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        ("m-seed0", "m"),
        ("a/m_seed_12", "a/m"),
        ("m/seed3/", "m"),
        ("seedling", "seedling"),
        ("seed0", "seed0"),
    ],
)
def test_family_is_the_model_without_its_seed(model, kind):
    assert family(model) == kind
