"""Releases of vLLM with which the plugin was tried, and what is said about others.

Not here: what needs their internals (`integrations.vllm.quantization_config`).
"""

import logging
from typing import Final

logger = logging.getLogger(__name__)

TRIED: Final = ("0.32", "0.33")
"""The table in docs/vllm.md says how, and with which transformers."""


def misfit() -> str:
    """What to say where a release of vLLM is, or may be, the reason of an error; names it and those tried."""
    import vllm

    return (
        f"this is vLLM {vllm.__version__}, and svdq_hf was tried with {' and '.join(TRIED)} (docs/vllm.md): "
        "install one of these, or `svdq export FOLDER OUT` and serve that"
    )


def warn_if_untried() -> None:
    """Log a warning where this release of vLLM was not tried."""
    import vllm

    if not vllm.__version__.startswith(tuple(f"{release}." for release in TRIED)):
        logger.warning("%s", misfit())
