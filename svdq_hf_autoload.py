"""SVDQ_AUTOLOAD=1: transformers finds "svdq" in programs that never say `import svdq_hf`.

For evaluation harnesses and other people's scripts. torch calls `install` at the end of `import torch`
(entry point group "torch.backends"), in every process on the machine: so this file imports nothing but
the standard library, does nothing unless it is asked to, and never raises. It is a module of its own
since importing a package would import svdq_hf itself.
"""

import os
import sys
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

WATCHED = QUANTIZERS, MODELS = ("transformers.quantizers", "transformers.modeling_utils")
"""The second imports the first, and svdq_hf both: it has to wait until neither is half imported."""


def install() -> None:
    """Import svdq_hf as soon as transformers can quantize, if SVDQ_AUTOLOAD=1."""
    if os.environ.get("SVDQ_AUTOLOAD") == "1":
        sys.meta_path.insert(0, _Watch())


class _Watch:
    """Finds the watched modules as Python itself would, and acts when they are there."""

    def find_spec(self, name: str, path: Any = None, target: object = None) -> ModuleSpec | None:
        """What the import system asks a finder, at every import."""
        if name not in WATCHED:
            self._act()  # a watched module may have been half imported when torch called `install`
            return None
        spec = PathFinder.find_spec(name, path)
        if spec is None or spec.loader is None:
            return None
        load = spec.loader.exec_module

        def load_and_act(module: ModuleType) -> None:
            load(module)
            self._act(done=name)

        spec.loader.exec_module = load_and_act  # type: ignore[method-assign]
        return spec

    def _act(self, done: str = "") -> None:
        found = {name: sys.modules[name] for name in WATCHED if name in sys.modules}
        half = [name for name, module in found.items() if getattr(module.__spec__, "_initializing", False)]
        if self not in sys.meta_path or QUANTIZERS not in found or set(half) - {done}:
            return
        sys.meta_path.remove(self)
        try:
            import svdq_hf  # noqa: F401
        except Exception as error:  # the host program must start without us
            print(f"SVDQ_AUTOLOAD=1: svdq_hf could not be imported: {error!r}", file=sys.stderr)
