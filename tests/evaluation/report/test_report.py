import csv
import re
from html.parser import HTMLParser

import pytest
from synthetic_cells import cell, overlap, write

from svdq_hf.evaluation.report.report import write_report

CELLS = [
    cell(correct="1111111111"),
    cell("svd", 16, correct="0000000000", kl=0.125, relative_error={"a": 0.1}),
    cell("magnitude", 16, correct="1111000000", kl=0.25),
]
STRANGE = '"><img src=x onerror=alert(1)>|`<script>evil()</script>'


class Reader(HTMLParser):
    """Tags with their attributes, and the texts of table cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] == "td":
            self.cells.append(data.strip())


def read(folder):
    return (folder / "report.html").read_text(encoding="utf-8")


def test_files_are_those_that_are_returned(tmp_path):
    write(tmp_path, CELLS, [overlap(), overlap(other="awq")])
    written = write_report(tmp_path)
    there = {path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".jsonl"}
    assert (set(written), len(written)) == (there, len(there))
    assert sorted(str(path.relative_to(tmp_path)) for path in written) == [
        "pictures/rte-mini-group-64-mse-error.png",
        "pictures/rte-mini-group-64-mse-error.svg",
        "pictures/rte-mini-group-64-mse-kl.png",
        "pictures/rte-mini-group-64-mse-kl.svg",
        "pictures/rte-mini-group-64-mse-score.png",
        "pictures/rte-mini-group-64-mse-score.svg",
        "pictures/rte-mini-rank-8-overlap-awq.png",
        "pictures/rte-mini-rank-8-overlap-awq.svg",
        "pictures/rte-mini-rank-8-overlap-spqr.png",
        "pictures/rte-mini-rank-8-overlap-spqr.svg",
        "report.html",
        "report.md",
        "tables/rte-mini-group-64-mse-main.csv",
        "tables/rte-mini-group-64-mse-runs.csv",
        "tables/rte-mini-rank-8-overlap-overlap.csv",
    ]


def test_values_reach_the_page_the_markdown_and_the_csv(tmp_path):
    write_report(write(tmp_path, CELLS))
    costs = ["svd", "16", "4.25", "+0.0000", "0.125"]
    row = [*costs, "0 of 10", "0.0000", "0.000 to 0.278", "worse, 0.002", "not distinguishable, 0.125"]
    cells = Reader(read(tmp_path)).cells
    at = next(at for at in range(len(cells)) if cells[at : at + 3] == row[:3])
    assert cells[at : at + 10] == row
    assert f"| {' | '.join(row)} |" in (tmp_path / "report.md").read_text()
    with (tmp_path / "tables" / "rte-mini-group-64-mse-main.csv").open() as opened:
        assert [line["kl"] for line in csv.DictReader(opened)] == ["", "0.125", "0.25"]


def test_same_cells_give_the_same_bytes(tmp_path):
    folders = [write(tmp_path / name, CELLS, [overlap()]) for name in "ab"]
    first, again = [{p.relative_to(f): p.read_bytes() for p in write_report(f)} for f in folders]
    assert first == again


def test_page_refers_to_nothing_outside(tmp_path):
    write_report(write(tmp_path, CELLS, [overlap()]))
    text = read(tmp_path)
    assert "http" not in text
    assert "@import" not in text
    assert set(re.findall(r"url\((.)", text)) == {"#"}
    references = [
        (tag, value)
        for tag, attrs in Reader(text).tags
        for name, value in attrs.items()
        if name in ("src", "href", "srcset", "data", "action", "poster")
    ]
    assert references
    assert all(value.startswith("#") for _, value in references)
    assert not {"link", "img", "iframe", "object", "base"} & {tag for tag, _ in Reader(text).tags}


def test_names_inside_the_page_are_unique_and_every_reference_has_one(tmp_path):
    write_report(write(tmp_path, CELLS, [overlap(), overlap(other="awq")]))
    text = read(tmp_path)
    ids = [attrs["id"] for _, attrs in Reader(text).tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', text)) <= set(ids)


def test_strangers_names_stay_text(tmp_path):
    strange = {"task": STRANGE, "model": STRANGE, "grid": STRANGE}
    cells = [
        cell(STRANGE, 16, **strange, metrics={STRANGE: 0.5}, relative_error={STRANGE: 0.5}),
        cell("svd", 16, **strange, metrics={STRANGE: 0.5}),
        cell(task=STRANGE, model=STRANGE, metrics={STRANGE: 0.5}),
    ]
    lines = [overlap(STRANGE, other=STRANGE, task=STRANGE, model=STRANGE)]
    written = write_report(write(tmp_path, cells, lines))
    assert all(path.is_relative_to(tmp_path) for path in written)
    tags = [tag for tag, _ in Reader(read(tmp_path)).tags]
    assert (tags.count("script"), tags.count("img")) == (1, 0)
    assert "<script" not in (tmp_path / "report.md").read_text()
    assert "<img" not in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize("name", ["../../x", "/etc/x", "", "..", "\ud800", "犬"])
def test_no_name_leads_out_of_the_folder(tmp_path, name):
    folder = write(tmp_path / "grid", [cell(task=name), cell("svd", 1, task=name)])
    write_report(folder)
    assert {path.name for path in tmp_path.iterdir()} == {"grid"}
    assert {path.name for path in folder.iterdir()} == {
        "cells.jsonl", "report.html", "report.md", "tables", "pictures"
    }  # fmt: skip


def test_tasks_whose_names_look_alike_keep_their_own_files(tmp_path):
    tasks = ["rte", "RTE!", "rte "]
    written = write_report(write(tmp_path, [cell(task=task) for task in tasks]))
    names = [path.name for path in written if path.name.endswith("main.csv")]
    assert names == ["rte-mini-main.csv", "rte-mini-2-main.csv", "rte-mini-3-main.csv"]


def test_half_a_grid_is_enough(tmp_path):
    write_report(write(tmp_path, [cell()]))
    assert "No row magnitude: not in the data." in read(tmp_path)


def test_empty_folder_is_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(ValueError, match="make some with `svdq evaluate"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []
