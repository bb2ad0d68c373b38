"""Promises about the house itself: public names, the map, the import order, the README's blocks."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import svdq_hf

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "svdq_hf"
README = (ROOT / "README.md").read_text()
MAP = re.findall(r"^\| `([\w/]+\.py)` \|", README, flags=re.M)


def imports_of(file: str) -> set[str]:
    """Files of the package that a file imports."""
    found = set()
    for node in ast.walk(ast.parse((PACKAGE / file).read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("svdq_hf"):
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            path = name.removeprefix("svdq_hf.").replace(".", "/") + ".py"
            if name.startswith("svdq_hf.") and (PACKAGE / path).is_file():
                found.add(path)
    return found


def test_public_names_are_all_sorted_and_there():
    assert svdq_hf.__all__ == sorted(svdq_hf.__all__)
    assert all(getattr(svdq_hf, name).__doc__ for name in svdq_hf.__all__)
    assert all(getattr(svdq_hf, name).__module__.startswith("svdq_hf.") for name in svdq_hf.__all__)


def test_map_of_the_readme_names_every_file():
    files = {str(file.relative_to(PACKAGE)) for file in PACKAGE.rglob("*.py")}
    empty = {f"{folder}/__init__.py" for folder in ("kernels", "evaluation", "streaming", "serving")}
    assert set(MAP) == files - empty
    assert not any((PACKAGE / file).read_text() for file in empty)


@pytest.mark.parametrize("file", MAP)
def test_a_file_imports_only_files_above_it_in_the_map(file):
    above = set(MAP[: MAP.index(file)])
    assert imports_of(file) <= above


def test_the_import_check_can_fail():
    assert imports_of("grid.py") == {"levels.py", "packing.py"}


def test_version_is_that_of_the_package():
    declared = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), flags=re.M)
    assert declared is not None
    assert svdq_hf.__version__ == declared[1]


def blocks(language: str) -> list[tuple[str, str | None]]:
    """Fenced blocks in a language, each with the text block that directly follows it."""
    pattern = rf"^```{language}\n(.*?)^```$(?:\s*^```text\n(.*?)^```$)?"
    return [(m[1], m[2]) for m in re.finditer(pattern, README, flags=re.M | re.S)]


def run(command: list[str], folder: Path) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, "PATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("code", "answer"), blocks("python"))
def test_python_block_of_the_readme_prints_its_answer(code, answer, tmp_path):
    of_peft = "ignore:`is_gradient_checkpointing:FutureWarning"  # it asks transformers by the old name
    printed = run([sys.executable, "-W", "error", "-W", of_peft, "-c", code], tmp_path)
    assert answer is None or printed == answer


@pytest.mark.slow
@pytest.mark.parametrize("script", [code for code, _ in blocks("sh") if "pip install" not in code])
def test_shell_block_of_the_readme_runs(script, tmp_path):
    assert run(["bash", "-euc", script], tmp_path)


def test_ci_runs_the_commands_of_the_readme():
    between = re.search(r"^<!-- commands -->\n(.*?)^<!-- end -->$", README, flags=re.M | re.S)
    assert between is not None
    commands = [line for line in between[1].splitlines() if line.startswith("python3")]
    assert len(commands) == 2
    assert commands[0].endswith("svdq demo")
    assert "pytest" in commands[1]
