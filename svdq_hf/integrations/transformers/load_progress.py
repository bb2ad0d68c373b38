"""Progress of quantizing while a model is loaded: a bar with layers and speed, and one line at the end.

Both stand on standard error and follow transformers' own switch, `logging.disable_progress_bar`. Not here:
the quantizing (`integrations.transformers.quantize_op`).
"""

import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers.utils import logging as hf_logging

from svdq_hf.quantize.footprint import footprint
from svdq_hf.quantize.footprint_text import sentence

BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} layers [{elapsed}<{remaining}{postfix}]"


class LoadProgress:
    """A bar over the weights that are quantized; none until the first is.

    Args:
        total: number of weights.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.bytes = 0
        self.started = 0.0
        self.bar: Any = None

    def begin(self) -> None:
        """A weight is about to be quantized."""
        if self.bar is None:
            self.started = time.perf_counter()
            self.bar = hf_logging.tqdm(total=self.total, desc="Quantizing", bar_format=BAR, leave=False)

    def add(self, weight: Tensor) -> None:
        """A weight was quantized.

        Args:
            weight: the dense one, `[out, in]` or `[experts, out, in]`.
        """
        self.bytes += weight.nbytes
        rate = self.bytes / 1e6 / max(time.perf_counter() - self.started, 1e-9)
        self.bar.set_postfix_str(f"{rate:.0f} MB/s", refresh=False)
        self.bar.update()

    def close(self) -> None:
        """No further weight comes."""
        if self.bar is not None:
            self.bar.close()


def tell(model: nn.Module, files: Iterable[str | Path]) -> None:
    """Say in a line on standard error what was made, where progress is shown at all.

    Args:
        model: the quantized model.
        files: of the dense checkpoint; none of a state dict.
    """
    if hf_logging.is_progress_bar_enabled() and sys.stderr is not None:
        before = sum(os.path.getsize(file) for file in files) or None
        print(f"svdq: {sentence(footprint(model), before)}", file=sys.stderr)
