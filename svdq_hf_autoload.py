"""SVDQ_AUTOLOAD=1: transformers finds "svdq" in programs that never say `import svdq_hf`.

For evaluation harnesses and other people's scripts. torch calls `install` at the end of `import torch`
(entry point group "torch.backends"), in every process on the machine: so this file imports nothing but
the standard library, does nothing unless it is asked to, and never raises. It is a module beside the
package because importing one of a package's modules imports the package, and that alone registers.
"""

import os
import sys


def install() -> None:
    """Import svdq_hf if SVDQ_AUTOLOAD=1; it waits for transformers by itself."""
    if os.environ.get("SVDQ_AUTOLOAD") != "1":
        return
    try:
        import svdq_hf  # noqa: F401
    except Exception as error:  # the host program must start without us
        print(f"SVDQ_AUTOLOAD=1: svdq_hf could not be imported: {error!r}", file=sys.stderr)
