"""Promises about the house itself: public names, imports, the version."""

import ast
import re
from pathlib import Path

import svdq_hf

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "svdq_hf"


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


def test_the_import_check_can_fail():
    assert imports_of("grid.py") == {"levels.py", "packing.py"}


def test_version_is_that_of_the_package():
    declared = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), flags=re.M)
    assert declared is not None
    assert svdq_hf.__version__ == declared[1]
