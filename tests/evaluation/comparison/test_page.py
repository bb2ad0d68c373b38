"""The page of a comparison: its structure, its numbers, and that it needs nothing from outside."""

import json
import re
from html.parser import HTMLParser

import pytest

from svdq_hf.evaluation.comparison.page import write_page
from svdq_hf.evaluation.comparison.result import ComparedModel, ComparisonResult, Quality
from svdq_hf.evaluation.comparison.statistics import Estimate


class Speed:
    load_seconds = 1.5
    run_peak_bytes = 2_000_000
    decode_tokens_per_second = 30.0
    prefill_tokens_per_second = 200.0

    def to_dict(self):
        return {"load_seconds": 1.5}


def model(name, **about):
    estimates = {"change": Estimate(0.05, 0.04, 0.06), "kl": Estimate(0.1, 0.09, 0.11)}
    quality = Quality(loss=3.0, same=Estimate(0.9, 0.8, 1.0), **estimates)
    told = {"verdict": f"{name} is close.", "advice": ["nearer: --bits 8"], "speed": Speed(), **about}
    return ComparedModel(name, None, None, 1_000_000, 4.5, 0.3, "", quality, **told)


class Structure(HTMLParser):
    """Tags that are open at the end, and what the page refers to."""

    def __init__(self, text):
        super().__init__()
        self.open, self.links, self.counts = [], [], {}
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self.links += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "path", "use", "rect", "line"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.links += [value for name, value in attributes if name in ("src", "href")]

    def handle_endtag(self, tag):
        if tag in self.open:
            while self.open.pop() != tag:
                pass


@pytest.fixture(scope="module")
def result():
    others = [model("svdq-best"), model("<script>x</script>")]
    return ComparisonResult("a text", "tokens", 9, model("dense & co"), others, 1.0, ("A note.",))


@pytest.fixture(scope="module")
def page(result, tmp_path_factory):
    return write_page(result, tmp_path_factory.mktemp("page"))


def test_the_page_is_one_file_with_its_pictures(page):
    found = Structure(page.read_text())
    assert found.open == []
    assert found.counts["svg"] == 5  # loss, KL, size, writing, reading
    assert found.counts["table"] == 1
    assert all(link.startswith("#") for link in found.links)


def test_the_page_says_the_verdicts_the_note_and_the_figures(page):
    text = page.read_text()
    for words in ("svdq-best is close.", "Try: nearer: --bits 8", "A note.", "+0.050", "dense &amp; co"):
        assert words in text
    assert "<script>x" not in text
    assert re.search(r"<button[^>]*>", text.partition("<script>")[0]) is None  # rows are quantities


def test_the_figures_are_beside_it(page, result):
    assert json.loads((page.parent / "compare.json").read_text()) == json.loads(json.dumps(result.to_dict()))


def test_what_was_not_measured_has_no_picture(result, tmp_path):
    one, two = (
        ComparedModel(name, None, None, None, None, None, "", Quality(cosine=Estimate(0.9, 0.8, 1.0)))
        for name in ("one", "two")
    )
    few = ComparisonResult("a text", "sentences", 9, one, [two], 1.0)
    assert Structure(write_page(few, tmp_path).read_text()).counts["svg"] == 1
