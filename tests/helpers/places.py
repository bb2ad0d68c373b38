"""Folders that tests read: the checkout, its examples, its helpers, and data that the repository has not."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
HELPERS = ROOT / "tests" / "helpers"
DATA = Path(os.environ.get("SVDQ_DATA", ROOT.parent / "shared" / "data"))
"""With `glue/` and `text/`; tests that need it are skipped where it is not there."""
