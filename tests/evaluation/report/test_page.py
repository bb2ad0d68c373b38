"""The page in a real browser: how wide it is, and what a click on a header does."""

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from synthetic_cells import cell, overlap, realistic, write

from svdq_hf.evaluation.report.page import inline
from svdq_hf.evaluation.report.report import write_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
needs_browser = pytest.mark.skipif(
    BROWSER is None, reason="no browser is here: none of chromium, chromium-browser and google-chrome"
)
# Headless browsers have no window of less than 500 pixels: a frame has, and a page in it cannot tell.
FRAME = """<!DOCTYPE html><body style="margin: 0"><pre id="answer"></pre><script>
addEventListener("message", (note) => {{ document.getElementById("answer").textContent = note.data; }});
</script><iframe src="asked.html" width="{width}" height="900" style="border: 0"></iframe></body>"""
WIDTHS = """
const all = (pattern) => [...document.querySelectorAll(pattern)];
const page = document.documentElement, measured = (name) => (one) => one.getBoundingClientRect()[name];
answer({
  width: innerWidth, room: page.clientWidth, page: page.scrollWidth,
  boxes: all(".box").map((box) => box.scrollWidth > box.clientWidth),
  pictures: all("figure svg").map(measured("width")), letters: all("figure svg text").map(measured("height")),
  font: getComputedStyle(document.querySelector("figure svg text")).fontFamily,
});
"""
SORT = """
const table = document.querySelector("table"), heads = [...table.tHead.rows[0].cells];
const at = heads.findIndex((head) => head.textContent === TITLE), button = heads[at].querySelector("button");
const column = () => [...table.tBodies[0].rows].map((row) => row.cells[at].textContent);
button.focus();
const before = column(), focused = document.activeElement === button;
button.click(); const up = column(), said = heads[at].getAttribute("aria-sort");
button.click(); const down = column(), then = heads[at].getAttribute("aria-sort");
heads[(at + 1) % heads.length].querySelector("button").click();
answer({ before, up, down, said, then, focused, after: heads[at].getAttribute("aria-sort"),
  hacked: typeof window.hacked !== "undefined" });
"""


def ask(folder: Path, width: int, script: str) -> Any:
    """What a script in a copy of the page answers, in a frame of that width."""
    page = (folder / "report.html").read_text(encoding="utf-8")
    # A block of its own, so that its names do not meet the page's.
    answer = 'const answer = (found) => parent.postMessage(JSON.stringify(found), "*");'
    asked = page.replace("</body>", f"<script>{{ {answer} {script} }}</script></body>")
    (folder / "asked.html").write_text(asked, encoding="utf-8")
    (folder / "frame.html").write_text(FRAME.format(width=width), encoding="utf-8")
    return json.loads(dom(folder / "frame.html", width))


def dom(page: Path, width: int) -> str:
    """The text that the page leaves in its element `answer`."""
    profile = f"--user-data-dir={page.parent / f'profile-{width}'}"
    size = f"--window-size={max(width, 500)},900"
    command = [str(BROWSER), *QUIET.split(), profile, size, "--virtual-time-budget=5000", "--dump-dom"]
    done = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r'<pre id="answer">(.+?)</pre>', done.stdout, flags=re.S)
    assert found is not None, done.stderr
    return unescape(found[1])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = realistic(tmp_path_factory.mktemp("grid"))
    write_report(folder)
    return folder


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize("width", [390, 1280])
def test_page_never_scrolls_sideways(whole, width):
    found = ask(whole, width, WIDTHS)
    assert found["width"] == width
    assert found["page"] == found["room"]
    # at a desk the tables fit; on a phone each scrolls inside its box
    assert found["boxes"] == [width == 390] * 3
    assert all(300 < picture <= 560 for picture in found["pictures"])
    assert min(found["letters"]) >= 8  # pixels
    assert "DejaVu" not in found["font"]


@pytest.mark.slow
@needs_browser
def test_page_of_very_long_names_never_scrolls_sideways(tmp_path):
    long = {"task": "t" * 300, "model": "m" * 300, "grid": "g" * 300}
    cells = [cell("s" * 300, 1, **long, relative_error={"l" * 300: 0.5})]
    write_report(write(tmp_path, cells, [overlap("l" * 300, other="o" * 300, task="t" * 300)]))
    found = ask(tmp_path, 390, WIDTHS)
    assert (found["width"], found["page"]) == (390, found["room"])


KLS = {"magnitude": 9.5, "awq": 0.0001, "spqr": 10.25, "none": float("nan")}


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    cells = [cell(), *(cell(name, 16, kl=kl) for name, kl in KLS.items())]
    name = "<script>window.hacked = 1</script>"
    folder = write(tmp_path_factory.mktemp("few"), [{**one, "task": name, "model": name} for one in cells])
    write_report(folder)
    return folder


@pytest.mark.slow
@needs_browser
def test_click_sorts_numbers_as_numbers_and_what_is_absent_last(few):
    found = ask(few, 1280, f'const TITLE = "KL from FP32"; {SORT}')
    assert found["before"] == ["-", "nan", "9.50", "0.000100", "10.2"]
    assert found["up"] == ["0.000100", "9.50", "10.2", "-", "nan"]
    assert found["down"] == ["10.2", "9.50", "0.000100", "-", "nan"]
    assert (found["said"], found["then"], found["after"]) == ("ascending", "descending", "none")
    assert found["focused"]
    assert not found["hacked"]


@pytest.mark.slow
@needs_browser
def test_click_sorts_words_as_words(few):
    found = ask(few, 390, f'const TITLE = "method"; {SORT}')
    assert found["up"] == ["4-bit, nothing salient", "awq", "FP32", "magnitude", "spqr"]
    assert found["down"] == found["up"][::-1]


def test_inlined_picture_has_its_own_names_and_the_pages_ink():
    svg = (
        '<?xml version="1.0"?><!DOCTYPE svg><svg xmlns="http://a" xmlns:xlink="http://b" width="9pt">'
        '<metadata>http://c</metadata><path id="m1" style="stroke: #1b1f24"/>'
        '<use xlink:href="#m1" clip-path="url(#p2)" style="stroke: #d0d7de"/></svg>'
    )
    assert inline(svg, "kl", 'a "title"') == (
        '<svg role="img" aria-label="a &quot;title&quot;" width="9pt">'
        '<path id="kl-m1" style="stroke: currentColor"/>'
        '<use href="#kl-m1" clip-path="url(#kl-p2)" style="stroke: var(--line)"/></svg>'
    )
