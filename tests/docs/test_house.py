"""Promises about the house itself: public names, floors of packages, imports, the version."""

import ast
import importlib
import re
from pathlib import Path

import pytest
from places import ROOT

import svdq_hf

PACKAGE = ROOT / "svdq_hf"
FLOORS = (
    {"core", "calibration"},
    {"format"},
    {"kernels", "config"},
    {"nn"},
    {"quantize"},
    {"integrations", "training", "hub"},
    {"checkpoint"},
    {"evaluation"},
    {"cli"},
)
"""From the lowest on: a package imports only from lower ones."""
OUTSIDE = {"__init__", "__main__", "adapters", "card", "demo"}
"""Flat files: the door of the package, and public paths into it."""
MOST_FLAT_FILES, MOST_PACKAGES, MOST_FLOORS = 6, 13, 9
MOST_PARAMETERS = 6
SIGNATURES_OF_OTHERS = {
    "integrations/vllm/linear_method.py:create_weights": "vLLM calls it",
    "hub/push.py:push_folder": "its keywords are those of transformers' push_to_hub",
}
"""Functions that may have more parameters, and why."""
FILES = sorted(PACKAGE.rglob("*.py"))


def imports_of(file: Path) -> set[Path]:
    """Files of the package that a file imports, at its top or in a function."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("svdq_hf"):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [node.module] if not any(map(file_of, names)) else names
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.startswith("svdq_hf")]
        found |= {path for name in names if (path := file_of(name))}
    return found


def file_of(module: str) -> Path | None:
    path = ROOT / module.replace(".", "/")
    candidates = (path.with_suffix(".py"), path / "__init__.py")
    return next((one for one in candidates if one.is_file()), None)


def room_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def floor_of(room: str) -> int:
    return next(floor for floor, rooms in enumerate(FLOORS, 1) if room in rooms)


def test_every_package_stands_on_a_floor_and_few_files_outside():
    rooms = {room_of(file) for file in FILES}
    assert rooms == set().union(*FLOORS) | OUTSIDE


def test_the_house_stays_small():
    assert len(list(PACKAGE.glob("*.py"))) <= MOST_FLAT_FILES
    assert len([path for path in PACKAGE.iterdir() if (path / "__init__.py").exists()]) <= MOST_PACKAGES
    assert len(FLOORS) <= MOST_FLOORS


def test_a_package_imports_only_from_lower_floors():
    up = [
        f"{file.relative_to(ROOT)} imports {other.relative_to(ROOT)}"
        for file in FILES
        if room_of(file) not in OUTSIDE
        for other in imports_of(file)
        if (room_of(other) in OUTSIDE - {"demo", "__init__"})
        or (
            (room_of(other) not in OUTSIDE and room_of(other) != room_of(file))
            and floor_of(room_of(other)) >= floor_of(room_of(file))
        )
    ]
    assert up == []


def test_no_file_imports_itself_by_way_of_others():
    below: dict[Path, set[Path]] = {file: imports_of(file) - {file} for file in FILES}
    while below:
        free = {file for file, others in below.items() if not others & below.keys()}
        assert free, f"a cycle among {sorted(str(file.relative_to(ROOT)) for file in below)}"
        below = {file: others for file, others in below.items() if file not in free}


def test_the_import_check_can_fail():
    found = {str(file.relative_to(PACKAGE)) for file in imports_of(PACKAGE / "core" / "grid.py")}
    assert found == {"core/grid_values.py", "core/levels.py"}


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """Names of a function's parameters, without `self` and `cls`."""
    told = function.args
    others = [one for one in (told.vararg, told.kwarg) if one is not None]
    every = [*told.posonlyargs, *told.args, *told.kwonlyargs, *others]
    return [one.arg for one in every if one.arg not in ("self", "cls")]


def test_no_function_but_constructors_has_more_than_six_parameters():
    many = {
        f"{file.relative_to(PACKAGE)}:{node.name}"
        for file in FILES
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name != "__init__"
        if len(parameters(node)) > MOST_PARAMETERS
    }
    assert many == set(SIGNATURES_OF_OTHERS)


def test_every_kind_of_parameter_is_counted():
    (function,) = ast.parse("def f(self, a, /, b, *c, d, e=1, **f): pass").body
    assert sorted(parameters(function)) == ["a", "b", "c", "d", "e", "f"]


@pytest.mark.parametrize("package", [file.parent for file in FILES if file.name == "__init__.py"], ids=str)
def test_no_package_exports_a_name_that_is_a_module_of_its_own(package):
    """`import svdq_hf.x as y` would give the one or the other."""
    tree = ast.parse((package / "__init__.py").read_text())
    imported = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert imported & {path.stem for path in package.iterdir()} == set()


def test_public_names_are_all_sorted_and_there():
    assert svdq_hf.__all__ == sorted(svdq_hf.__all__)
    assert all(getattr(svdq_hf, name).__doc__ for name in svdq_hf.__all__)
    assert all(getattr(svdq_hf, name).__module__.startswith("svdq_hf.") for name in svdq_hf.__all__)


def test_public_names_are_where_type_checkers_are_told():
    """`__init__` imports them for type checkers, and names their homes once more for Python."""
    (checked,) = [
        node for node in ast.parse((PACKAGE / "__init__.py").read_text()).body if isinstance(node, ast.If)
    ]
    told = {(node.module, alias.name) for node in checked.body for alias in node.names}
    assert told == {(home, name) for home, names in svdq_hf._HOMES.items() for name in names}
    assert sorted(name for _, name in told) == svdq_hf.__all__


def test_public_names_are_listed_and_star_imported():
    assert set(svdq_hf.__all__) <= set(dir(svdq_hf))
    names: dict[str, object] = {}
    exec("from svdq_hf import *", names)
    assert all(names[name] is getattr(svdq_hf, name) for name in svdq_hf.__all__)


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'svdq_hf' has no attribute 'quantise_model'"):
        svdq_hf.quantise_model  # noqa: B018
    with pytest.raises(ModuleNotFoundError, match=r"svdq_hf\.footprint"):
        importlib.import_module("svdq_hf.footprint")


def test_nothing_says_that_the_package_is_in_a_registry():
    files = [*FILES, *(ROOT / "examples").glob("*.py")]
    told = [file for file in files if re.search(r"pip install (-\S+ )*['\"]?svdq_hf", file.read_text())]
    assert told == [PACKAGE / "core" / "release.py"]  # which says that no text may


def test_version_is_that_of_the_package():
    declared = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), flags=re.M)
    assert declared is not None
    assert svdq_hf.__version__ == declared[1]
