"""vLLM plugin: registers svdq's quantization config, found by entry point `vllm.general_plugins`.

vLLM calls it in every process that it starts, also for models that are none of ours: so it raises nothing.
Where this vLLM has other internals than the config needs, loading a model of svdq says so. Not here: the
config itself (`integrations.vllm.quantization_config`), which imports vLLM.
"""

import logging
from typing import Any, Final

from svdq_hf.config.choices import QUANT_METHOD

logger = logging.getLogger(__name__)

TRIED: Final = ("0.32", "0.33")
"""Releases of vLLM with which the plugin was tried; the table in docs/vllm.md says how."""


def register() -> None:
    """Register "svdq" with vLLM; may be called repeatedly."""
    from vllm.model_executor.layers.quantization import register_quantization_config

    try:
        from svdq_hf.integrations.vllm.quantization_config import SVDQVllmConfig
    except ImportError as error:
        register_quantization_config(QUANT_METHOD)(_refusal(f"{misfit()}: {error}"))
    else:
        register_quantization_config(QUANT_METHOD)(SVDQVllmConfig)


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


def _refusal(reason: str) -> type[Any]:
    """A quantization config that refuses every model, for a vLLM in which ours cannot be imported."""
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

    class RefusedConfig(QuantizationConfig):  # type: ignore[misc]  # vLLM is not installed where mypy runs
        @classmethod
        def from_config(cls, config: dict[str, Any]) -> Any:
            raise ValueError(f"a model quantized by svdq cannot be served here: {reason}")

    return RefusedConfig
