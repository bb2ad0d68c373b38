"""Every block of every page runs, one interpreter a page, and prints the answer that stands below it.

A page's blocks run in order in one empty folder, so that a block may use the files of those above it. Two
comments in a page say more to this test than to a reader:

`<!-- before: WHY`, lines of Python, `-->`: run before the block that follows, for what the reader has.
`<!-- not run: REASON -->`: the block that follows is not run (a Python one is still compiled).
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from places import HELPERS, ROOT

PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES += sorted((ROOT / "docs").rglob("*.md"))

BLOCK = re.compile(
    r"(?:^<!-- before: [^\n]*\n(?P<before>.*?)^-->\n)?"
    r"(?:^<!-- not run: (?P<reason>[^\n]*) -->\n)?"
    r"^```(?P<language>\w+)\n(?P<code>.*?)^```$"
    r"(?:\s*^```text\n(?P<answer>.*?)^```$)?",
    flags=re.M | re.S,
)
SETS_UP = re.compile(r"(?:^|&& )(?:pip|pre-commit|make) ", flags=re.M)
"""In sh blocks that change an environment or need a checkout: not run here; the README's two are CI's."""

RUNS = [sys.executable, "-W", "error", "-W", "ignore:`is_gradient_checkpointing:FutureWarning"]
"""The second warning is PEFT's, which asks transformers by an old name."""


class Block(NamedTuple):
    """A fenced block in Python or sh; answer: the text block below it. reason: why it is not run, or None."""

    language: str
    code: str
    before: str | None
    answer: str | None
    reason: str | None


def blocks(text: str) -> list[Block]:
    found = [Block(*match.group(*Block._fields)) for match in BLOCK.finditer(text)]
    return [block for block in found if block.language in ("python", "sh")]


def runs(block: Block) -> bool:
    sets_up = block.language == "sh" and SETS_UP.search(block.code)
    return block.reason is None and not sets_up


def page_id(page: Path) -> str:
    return str(page.relative_to(ROOT))


WITH_BLOCKS = [page for page in PAGES if any(runs(block) for block in blocks(page.read_text()))]
NOT_RUN = [(page_id(page), b) for page in PAGES for b in blocks(page.read_text()) if b.reason is not None]


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_BLOCKS, ids=page_id)
def test_every_block_of_a_page_prints_its_answer(page, tmp_path):
    expected, given = [], []
    for block in filter(runs, blocks(page.read_text())):
        if block.before is not None:
            expected.append(None)
            given.append(("python", block.before))
        expected.append(block.answer)
        given.append((block.language, block.code))
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [*RUNS, str(HELPERS / "run_page.py")],
        input=json.dumps(given),
        cwd=tmp_path,
        env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout.splitlines()[-1])
    assert printed == [p if answer is None else answer for p, answer in zip(printed, expected, strict=True)]


def test_the_few_blocks_that_are_not_run_say_why_and_compile():
    assert len(NOT_RUN) <= 10  # a GPU, vLLM, llama.cpp, sinq, and what takes minutes
    for page, block in NOT_RUN:
        assert len(block.reason.split()) >= 3, page
        if block.language == "python":
            compile(block.code, page, "exec")


def test_blocks_are_found_with_what_stands_around_them():
    text = "<!-- before: so\nx = 1\n-->\n```python\ny\n```\n\n```text\n2\n```\n"
    text += "<!-- not run: no GPU -->\n```sh\na\n```\n```sh\ncd x && pip install .\n```\n"
    assert blocks(text) == [
        Block("python", "y\n", "x = 1\n", "2\n", None),
        Block("sh", "a\n", None, None, "no GPU"),
        Block("sh", "cd x && pip install .\n", None, None, None),
    ]
    assert [runs(block) for block in blocks(text)] == [True, False, False]
