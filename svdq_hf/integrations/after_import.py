"""Import hook: calls a function when a module of another library has been imported.

So `import svdq_hf` can extend torch, transformers and PEFT without importing them. Only the standard
library is imported here. Not here: what the functions do (`integrations.registration`).
"""

import sys
import warnings
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

OURS = "svdq_hf."


class AfterImport:
    """A finder of `sys.meta_path` that calls `action` after each import of one of `names`.

    It finds nothing itself: it passes the search on to the finders after it. `action` is called again when a
    module is reloaded, and possibly more often, so a repeated call must be harmless. Its errors become
    warnings, since the import that led to it is somebody else's. Where it fails because modules of this
    package are half imported, it is called again at a later import.

    Args:
        names: full names of modules.
        action: called without arguments; it looks into `sys.modules` for what is imported.
    """

    def __init__(self, names: tuple[str, ...], action: Callable[[], None]) -> None:
        self.names = names
        self.action = action
        self._done: set[str] = set()

    def install(self) -> None:
        """Call `action` now if a module is imported already, and from now on after each import of one."""
        if not any(isinstance(one, AfterImport) and one.names == self.names for one in sys.meta_path):
            sys.meta_path.insert(0, self)
        self._look()

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """The method that the import system calls at every import.

        Args:
            name: full name of the module that is searched.
            path: where its package's modules are.
            target: the module itself, where it is reloaded.

        Returns:
            The spec that the next finders find, with a loader that calls `action`; None for all other
                modules.
        """
        if name not in self.names:
            if not name.startswith(OURS):  # the action may import it, and it would be run twice
                self._look()
            return None
        spec = self._find(name, path, target)
        if spec is not None and hasattr(spec.loader, "exec_module"):
            spec.loader = _Loader(spec.loader, self)  # type: ignore[assignment]  # it acts as one
        return spec

    def loaded(self, name: str) -> None:
        """Call `action`, now that the module has run."""
        self._done.add(name)  # first: the action imports modules itself
        try:
            self.action()
        except Exception as error:
            if any(key.startswith(OURS) and not _is_complete(one) for key, one in [*sys.modules.items()]):
                self._done.discard(name)
                return
            warnings.warn(f"svdq_hf could not register with {name}: {error!r}", RuntimeWarning, stacklevel=2)

    def _look(self) -> None:
        """Handle modules whose import was not followed: begun before, or found by another finder."""
        for name in self.names:
            if name not in self._done and _is_complete(sys.modules.get(name)):
                self.loaded(name)

    def _find(self, name: str, path: Any, target: Any) -> ModuleSpec | None:
        finders = list(sys.meta_path)
        for finder in finders[finders.index(self) + 1 :] if self in finders else ():
            find = getattr(finder, "find_spec", None)
            try:
                spec: ModuleSpec | None = find(name, path, target) if find else None
            except Exception:  # Python asks this finder next, and its error is raised then
                return None
            if spec is not None:
                return spec
        return None


class _Loader:
    """Wrapper of a module's own loader that informs the hook when the module has run."""

    def __init__(self, found: Any, hook: AfterImport) -> None:
        self._found = found
        self._hook = hook

    def __getattr__(self, name: str) -> Any:
        return getattr(self._found, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """An empty module, or None for Python's own way of making one."""
        module: ModuleType | None = self._found.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Run the module."""
        module.__loader__ = self._found
        if module.__spec__ is not None:
            module.__spec__.loader = self._found
        self._found.exec_module(module)
        self._hook.loaded(module.__name__)


def _is_complete(module: ModuleType | None) -> bool:
    return module is not None and not getattr(getattr(module, "__spec__", None), "_initializing", False)
