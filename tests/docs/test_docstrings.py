"""Promises of the docstrings: shapes of tensors, errors that a function raises, and files that are there."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from places import ROOT

PACKAGE = ROOT / "svdq_hf"
FILES = sorted(file for file in PACKAGE.rglob("*.py") if file.read_text().strip())
SHAPE = re.compile(r"`[^`\n]*\[\*?[\w.]+(( ?[,*+/] ?| or )\*?[\w.]+)*\][^`\n]*`")
"""As in `[out, in]`, `[n]`, `[..., columns]`, `[rows, *packed_shape]`."""
ROOMS = {path.name for path in PACKAGE.iterdir() if path.is_dir()}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def public(tree: ast.Module) -> Iterator[tuple[str, Function | ast.ClassDef, str]]:
    """Public functions, classes and methods of a file: name, node and docstring."""
    for node in tree.body:
        if not isinstance(node, Function | ast.ClassDef) or node.name.startswith("_"):
            continue
        yield node.name, node, ast.get_docstring(node) or ""
        for method in node.body if isinstance(node, ast.ClassDef) else []:
            if isinstance(method, Function) and not method.name.startswith("_"):
                yield f"{node.name}.{method.name}", method, ast.get_docstring(method) or ""


def annotations(node: Function | ast.ClassDef) -> list[ast.expr]:
    """What a function takes and gives; what a class declares."""
    if isinstance(node, ast.ClassDef):
        fields = [one for one in node.body if isinstance(one, ast.AnnAssign)]
        return [one.annotation for one in fields if not str(getattr(one.target, "id", "")).startswith("_")]
    arguments = node.args
    every = [
        *arguments.posonlyargs,
        *arguments.args,
        *arguments.kwonlyargs,
        arguments.vararg,
        arguments.kwarg,
    ]
    found = [one.annotation for one in every if one is not None] + [node.returns]
    return [one for one in found if one is not None]


def has_tensor(node: Function | ast.ClassDef) -> bool:
    names = (name for annotation in annotations(node) for name in ast.walk(annotation))
    return any(getattr(name, "id", getattr(name, "attr", "")) == "Tensor" for name in names)


def raises(node: ast.AST) -> bool:
    """Whether a function raises an error itself, not in a function inside, and not to catch it again."""
    inner = [one for one in ast.iter_child_nodes(node) if not isinstance(one, Function | ast.ClassDef)]
    if isinstance(node, ast.Try) and any(getattr(one.type, "id", "") == "Exception" for one in node.handlers):
        inner = [one for one in inner if one not in node.body]
    return any((isinstance(one, ast.Raise) and one.exc is not None) or raises(one) for one in inner)


def shapeless(tree: ast.Module) -> list[str]:
    return [name for name, node, text in public(tree) if has_tensor(node) and not SHAPE.search(text)]


def silent(tree: ast.Module) -> list[str]:
    functions = ((name, node, text) for name, node, text in public(tree) if isinstance(node, Function))
    return [name for name, node, text in functions if raises(node) and "Raises:" not in text]


def words(tree: ast.AST) -> set[str]:
    """Every name that code says: of variables, functions, parameters, attributes, and texts of one word."""
    found: set[str] = set()
    for node in ast.walk(tree):
        values = (getattr(node, field, None) for field in ("id", "name", "arg", "attr", "value"))
        found |= {value for value in values if isinstance(value, str) and value.isidentifier()}
    return found


EVERY_WORD = set().union(*(words(ast.parse(file.read_text())) for file in FILES))
STEMS = {file.stem for file in FILES} | ROOMS
TESTS = {name for file in (ROOT / "tests").rglob("*.py") for name in words(ast.parse(file.read_text()))}


def is_there(word: str) -> bool:
    """Whether `room.file`, or `room.file.name`, is a file or folder of the package (and a name in it)."""
    *way, last = word.split(".")
    path = PACKAGE.joinpath(*way, last)
    if path.is_dir() or path.with_suffix(".py").is_file():
        return True
    home = PACKAGE.joinpath(*way).with_suffix(".py")
    return home.is_file() and last in words(ast.parse(home.read_text()))


def lost(file: Path) -> list[str]:
    """Words in backticks, of a file's header, that are neither a file by its full name nor a name in code."""
    tree = ast.parse(file.read_text())
    marked = re.findall(r"`([a-z_]+(?:\.[a-z_0-9]+)*)`", ast.get_docstring(tree) or "")
    found = []
    for word in marked:
        room, *rest = word.split(".")
        if rest and room in ROOMS:
            found += [] if is_there(word) else [word]
        elif not rest:
            own = word in words(tree) or word in ROOMS or (word.startswith("test_") and word in TESTS)
            found += [] if own or word in EVERY_WORD - STEMS else [word]
    return found


def named(file: Path) -> str:
    return str(file.relative_to(ROOT))


@pytest.mark.parametrize("check", [shapeless, silent])
def test_public_functions_say_shapes_and_errors(check):
    found = [f"{named(file)}: {name}" for file in FILES for name in check(ast.parse(file.read_text()))]
    assert found == []


def test_headers_name_files_that_are_there():
    found = [f"{named(file)}: {word}" for file in FILES for word in lost(file)]
    assert found == []


@pytest.mark.parametrize(
    ("check", "text", "expected"),
    [
        (shapeless, 'def f(x: Tensor | None) -> int:\n    """A sum."""', ["f"]),
        (shapeless, 'def f(x: int) -> dict[str, Tensor]:\n    """Of `[out, in]`."""', []),
        (silent, 'class A:\n    def f(self):\n        """Try."""\n        raise ValueError', ["A.f"]),
        (silent, 'def f():\n    """Make."""\n    def g():\n        raise ValueError\n    return g', []),
        (
            silent,
            'def f():\n    """Try.\n\n    Raises:\n        ValueError: always."""\n    raise ValueError',
            [],
        ),
    ],
)
def test_the_checks_can_fail(check, text, expected):
    assert check(ast.parse(text)) == expected


def test_a_file_is_found_by_its_room():
    assert is_there("quantize.convert")
    assert is_there("checkpoint.streaming")
    assert is_there("format.encode.encode")
    assert not is_there("quantize.stacks")
