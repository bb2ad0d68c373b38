"""The import hook, on small modules of files, archives and other finders."""

import importlib
import importlib.util
import inspect
import sys
import zipfile
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

import pytest

from svdq_hf.integrations.after_import import OURS, AfterImport

NAME = "watched_by_svdq"
OTHER = "beside_the_watched"
BODY = "value = 1\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of modules; what is imported, and finders, are forgotten afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    (tmp_path / f"{NAME}.py").write_text(BODY)
    (tmp_path / f"{OTHER}.py").write_text("")
    yield tmp_path
    for name in (NAME, OTHER):
        sys.modules.pop(name, None)


@pytest.fixture
def seen() -> list[object]:
    """What the module's value was at each call of the action."""
    return []


@pytest.fixture
def hook(folder: Path, seen: list[object]) -> AfterImport:
    def action() -> None:
        seen.append(getattr(sys.modules.get(NAME), "value", None))

    return AfterImport((NAME,), action)


def test_it_acts_when_the_module_has_run_and_not_before(hook, seen):
    hook.install()
    importlib.import_module(OTHER)
    assert seen == []
    importlib.import_module(NAME)
    assert seen == [1]
    importlib.import_module(NAME)
    assert seen == [1]


def test_it_acts_at_once_where_the_module_is_there(hook, seen):
    importlib.import_module(NAME)
    hook.install()
    assert seen == [1]


def test_the_module_keeps_its_own_loader_and_source(hook):
    hook.install()
    module = importlib.import_module(NAME)
    assert type(module.__loader__).__name__ == type(module.__spec__.loader).__name__ == "SourceFileLoader"
    assert inspect.getsource(module) == BODY


def test_looking_for_the_module_does_not_import_it(hook, seen, folder):
    hook.install()
    spec = importlib.util.find_spec(NAME)
    assert spec is not None
    assert spec.origin == str(folder / f"{NAME}.py")
    assert spec.loader.get_source(NAME) == BODY
    assert NAME not in sys.modules
    assert seen == []
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.value == 1


def test_a_reload_is_followed(hook, seen, folder):
    hook.install()
    module = importlib.import_module(NAME)
    (folder / f"{NAME}.py").write_text("value = 23\n")
    importlib.reload(module)
    assert seen == [1, 23]


def test_a_second_hook_for_the_same_is_not_put_in(hook, seen):
    hook.install()
    before = len(sys.meta_path)
    AfterImport(hook.names, hook.action).install()
    assert len(sys.meta_path) == before


def test_a_module_that_is_just_being_imported_is_waited_for(hook, seen, folder, monkeypatch):
    (folder / f"{NAME}.py").write_text("import sys\nsys.install_hook()\nvalue = 2\n")
    monkeypatch.setattr(sys, "install_hook", hook.install, raising=False)
    importlib.import_module(NAME)
    assert seen == []
    importlib.import_module(OTHER)
    assert seen == [2]


def test_a_module_that_a_finder_before_it_finds_is_noticed_later(hook, seen):
    class First:
        @staticmethod
        def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
            return PathFinder.find_spec(name) if name == NAME else None

    hook.install()
    sys.meta_path.insert(0, First)
    importlib.import_module(NAME)
    assert seen == []
    importlib.import_module(OTHER)
    assert seen == [1]


def test_finders_after_it_are_asked(hook, seen, folder, monkeypatch):
    """As those of editable installs, which stand last."""

    class Editable:
        @classmethod
        def find_spec(cls, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
            file = folder / "elsewhere.py"
            return importlib.util.spec_from_file_location(name, file) if name == NAME else None

    (folder / f"{NAME}.py").rename(folder / "elsewhere.py")
    sys.meta_path.append(Editable)
    hook.install()
    assert importlib.import_module(NAME).__file__ == str(folder / "elsewhere.py")
    assert seen == [1]


def test_the_shared_loader_of_an_archive_stays_as_it_is(hook, seen, folder, monkeypatch):
    for name in (NAME, OTHER):
        (folder / f"{name}.py").unlink()
    with zipfile.ZipFile(folder / "modules.zip", "w") as archive:
        archive.writestr(f"{NAME}.py", "value = 3\n")
        archive.writestr(f"{OTHER}.py", "")
    monkeypatch.syspath_prepend(folder / "modules.zip")
    hook.install()
    loader = importlib.import_module(NAME).__loader__
    assert importlib.import_module(OTHER).__loader__ is loader
    assert seen == [3]


def test_a_namespace_has_no_code_to_wait_for(hook, seen, folder):
    (folder / f"{NAME}.py").unlink()
    (folder / NAME).mkdir()
    hook.install()
    importlib.import_module(NAME)
    importlib.import_module(OTHER)
    assert seen == [None]


def test_a_module_that_is_nowhere_is_not_found_as_ever(hook, seen, folder):
    (folder / f"{NAME}.py").unlink()
    hook.install()
    with pytest.raises(ModuleNotFoundError, match=f"No module named '{NAME}'"):
        importlib.import_module(NAME)
    assert seen == []


def test_a_module_that_fails_is_not_acted_on(hook, seen, folder):
    (folder / f"{NAME}.py").write_text("1 / 0")
    hook.install()
    with pytest.raises(ZeroDivisionError):
        importlib.import_module(NAME)
    assert seen == []


def test_the_error_of_another_finder_is_its_own(hook):
    class Broken:
        def find_spec(self, name: str, path: object = None, target: object = None) -> None:
            if name == NAME:
                raise KeyError("broken")

    hook.install()
    sys.meta_path.append(Broken())
    sys.meta_path.remove(PathFinder)
    assert hook.find_spec(NAME) is None
    with pytest.raises(KeyError, match="broken"):
        importlib.import_module(NAME)


def test_an_error_of_the_action_is_a_warning_and_the_import_is_done(folder):
    def action() -> None:
        raise KeyError("broken")

    AfterImport((NAME,), action).install()
    with pytest.warns(RuntimeWarning, match=rf"svdq_hf could not register with {NAME}: KeyError\('broken'\)"):
        assert importlib.import_module(NAME).value == 1


def test_where_our_own_modules_are_half_imported_it_is_tried_again(folder, seen, monkeypatch):
    half = ModuleType(f"{OURS}half")
    half.__spec__ = ModuleSpec(half.__name__, None)
    half.__spec__._initializing = True
    monkeypatch.setitem(sys.modules, half.__name__, half)

    def action() -> None:
        if half.__spec__._initializing:
            raise ImportError("partially initialized")
        seen.append("done")

    AfterImport((NAME,), action).install()
    importlib.import_module(NAME)
    assert seen == []
    half.__spec__._initializing = False
    importlib.import_module(OTHER)
    assert seen == ["done"]


def test_of_several_modules_each_is_followed(folder):
    calls: list[Callable[[], None]] = []
    hook = AfterImport((NAME, OTHER), lambda: calls.append(hook.install))
    hook.install()
    importlib.import_module(OTHER)
    importlib.import_module(NAME)
    assert len(calls) == 2
