"""vLLM plugin: registers svdq's quantization config, found by entry point `vllm.general_plugins`.

vLLM calls it in every process that it starts, also for models that are none of ours: so it raises nothing.
Where this vLLM has other internals than the config needs, loading a model of svdq says so. Not here: the
config itself (`integrations.vllm.quantization_config`), which imports vLLM.
"""

from typing import Any

from svdq_hf.config.choices import QUANT_METHOD
from svdq_hf.integrations.vllm.releases import misfit


def register() -> None:
    """Register "svdq" with vLLM; may be called repeatedly."""
    from vllm.model_executor.layers.quantization import register_quantization_config

    try:
        from svdq_hf.integrations.vllm.quantization_config import SVDQVllmConfig
    except ImportError as error:
        register_quantization_config(QUANT_METHOD)(_refusal(f"{misfit()}: {error}"))
    else:
        register_quantization_config(QUANT_METHOD)(SVDQVllmConfig)


def _refusal(reason: str) -> type[Any]:
    """A quantization config that refuses every model, for a vLLM in which ours cannot be imported."""
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

    class RefusedConfig(QuantizationConfig):  # type: ignore[misc]  # vLLM is not installed where mypy runs
        @classmethod
        def from_config(cls, config: dict[str, Any]) -> Any:
            raise ValueError(f"a model quantized by svdq cannot be served here: {reason}")

    return RefusedConfig
