"""What the pages promise about themselves: size, links, completeness; the README's two commands."""

import ast
import inspect
import re
from pathlib import Path

import pytest
from places import ROOT

import svdq_hf
from svdq_hf import SVDQConfig
from svdq_hf.config.choices import CHOICES
from svdq_hf.config.presets import PRESETS

README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *DOCS]

MOST_LINES, LONGEST_LINE = 200, 400
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def prose(page: Path) -> str:
    """A page without its fenced blocks and comments, in which nothing is a link or a heading."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    return re.sub(r"<!--.*?-->", "", text, flags=re.S)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    found: list[str] = []
    for heading in re.findall(r"^#+ (.+)$", prose(page), flags=re.M):
        text = LINK.sub(lambda match: match[0].partition("]")[0].lstrip("!["), heading)
        slug = re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")
        same = sum(re.fullmatch(rf"{re.escape(slug)}(-\d+)?", other) is not None for other in found)
        found.append(f"{slug}-{same}" if same else slug)
    return set(found)


def broken_links(page: Path) -> list[str]:
    broken = []
    for target in LINK.findall(re.sub(r"`[^`\n]*`", "", prose(page))):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_and_its_anchor_exists(page):
    assert broken_links(page) == []


def test_the_link_check_can_fail(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A `b`: c\n## Same\n## Same\n[a](#a-b-c) [b](#same-1) [c](#same-2) [d](none.md)\n")
    assert anchors(page) == {"a-b-c", "same", "same-1"}
    assert broken_links(page) == ["#same-2", "none.md"]


def test_the_readme_is_read_in_one_sitting():
    lines = README.read_text().splitlines()
    assert len(lines) <= MOST_LINES
    assert [line for line in lines if len(line) > LONGEST_LINE] == []


def test_every_page_is_in_the_index():
    index = ROOT / "docs" / "README.md"
    targets = {(index.parent / link).resolve() for link in LINK.findall(index.read_text()) if ":" not in link}
    assert set(DOCS) - {index} <= targets


def test_ci_finds_the_two_commands_in_the_readme():
    between = re.search(r"^<!-- commands -->\n(.*?)^<!-- end -->$", README.read_text(), flags=re.M | re.S)
    assert between is not None
    commands = [line for line in between[1].splitlines() if line.startswith("python3")]
    assert len(commands) == 2
    assert commands[0].endswith("svdq demo")
    assert "pytest" in commands[1]


def test_nothing_says_that_the_package_is_on_pypi():
    for page in PAGES:
        assert not re.search(r"pip install (-\S+ )*['\"]?svdq_hf", page.read_text()), page


def test_every_public_name_is_in_the_pages():
    text = "\n".join(page.read_text() for page in DOCS)
    assert [name for name in svdq_hf.__all__ if not re.search(rf"`{name}\b", text)] == []


def test_every_choice_stands_in_the_table_with_its_default():
    table = (ROOT / "docs" / "choices.md").read_text().partition("## Every choice")[2]
    written = dict(re.findall(r"^\| `(\w+)` \| `?([^|`]+)`? \|", table, flags=re.M))
    parameters = inspect.signature(SVDQConfig.__init__).parameters
    choices = {
        name: parameter.default
        for name, parameter in parameters.items()
        if name != "self" and parameter.kind is not parameter.VAR_KEYWORD
    }
    assert {name: ast.literal_eval(default) for name, default in written.items()} == choices


def test_every_choice_is_told_as_on_the_command_line():
    table = (ROOT / "docs" / "choices.md").read_text().partition("## Every choice")[2]
    told = {
        name: re.sub('[`"]', "", text)
        for name, text in re.findall(r"^\| `(\w+)` \| [^|]+ \| ([^|]+) \|$", table, flags=re.M)
    }
    assert told.keys() == CHOICES.keys()
    assert [name for name, row in CHOICES.items() if not told[name].startswith(row.help)] == []


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_sets_what_its_row_says(preset):
    text = (ROOT / "docs" / "choices.md").read_text()
    row = re.search(rf"^\| `SVDQConfig\.{preset}\(\)` \|.*$", text, flags=re.M)
    assert row is not None
    said = {name: ast.literal_eval(value) for name, value in re.findall(r"`(\w+)=([^`]+)`", row[0])}
    assert SVDQConfig(**said) == getattr(SVDQConfig, preset)()


def test_make_alone_only_tells_its_targets():
    """It must change no file; each target that CONTRIBUTING names is told."""
    lines = (ROOT / "Makefile").read_text().splitlines()
    targets = [line.removesuffix(":") for line in lines if re.fullmatch(r"[a-z-]+:", line)]
    assert targets[0] == "help"
    told = re.findall(r'^\t@echo "make (\S+)', (ROOT / "Makefile").read_text(), flags=re.M)
    assert told == targets[1:]
