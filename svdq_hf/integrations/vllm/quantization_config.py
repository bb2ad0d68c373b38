"""vLLM's quantization config for svdq: which of a model's layers are quantized, and the method of each.

config.json does not list the quantized layers, so their names are read from the headers of the files.
Imported by vLLM only. Not here: what the methods do (`integrations.vllm.linear_method`,
`integrations.vllm.vocabulary`), and experts, which are refused.
"""

from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.transformers_utils.config import get_safetensors_params_metadata

from svdq_hf.config import SVDQConfig
from svdq_hf.config.choices import QUANT_METHOD
from svdq_hf.integrations.vllm.linear_method import SVDQLinearMethod
from svdq_hf.integrations.vllm.releases import warn_if_untried
from svdq_hf.integrations.vllm.vocabulary import SVDQVocabularyMethod

REMEDY = "quantize with modules_to_not_convert=['experts'], or `svdq export FOLDER OUT` and serve that"


class SVDQVllmConfig(QuantizationConfig):  # type: ignore[misc]  # vLLM is not installed where mypy runs
    """vLLM's quantization config for svdq, made from config.json and the files' headers."""

    def __init__(self, choices: SVDQConfig) -> None:
        super().__init__()
        if choices.activations is not None:
            raise ValueError(
                f"activations={choices.activations}: vLLM runs layers of svdq that round weights alone; run "
                "this model with transformers, or export it dense (`svdq export`)"
            )
        self.choices = choices
        self.layers: list[str] = []
        """Names of the quantized layers, as the model has them."""
        self.heads: list[nn.Module] = []
        """The model's output heads, once they are made: an embedding may be the same matrix."""

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "SVDQVllmConfig":
        """The config of a `quantization_config` in config.json."""
        warn_if_untried()
        return cls(SVDQConfig.from_dict(config))

    def get_name(self) -> str:
        """The method's name in config.json."""
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Allowed dtypes of activations."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Least compute capability: vLLM's own, since the op is plain torch where Triton has no kernels."""
        return 70

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: config.json says everything."""
        return []

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """Read from the files' headers which layers are quantized; config.json does not list them.

        Args:
            model_name: folder, or name on the Hub.
            hf_config: not used.
            revision: on the Hub.

        Raises:
            ValueError: no layer is quantized, or experts are. Headers decide, since not all of vLLM's models
                ask for experts by their names in files.
        """
        stored = get_safetensors_params_metadata(model_name, revision=revision)
        if any(name.endswith("_salient_rows") for name in stored):
            raise ValueError(
                f"{model_name}: its experts are quantized, and in vLLM svdq serves linear layers, output "
                f"heads and embeddings only: {REMEDY}"
            )
        found = {name.rpartition("salient_rows")[0].rstrip(".") for name in stored}
        self.layers = sorted(found - {""})
        if not self.layers:
            raise ValueError(f"{model_name}: no layer in its safetensors files is quantized by svdq")

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Rename the layers as vLLM's model does."""
        self.layers = hf_to_vllm_mapper.apply_list(self.layers)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The method with which vLLM computes a layer.

        Args:
            layer: vLLM's layer.
            prefix: its name.

        Raises:
            ValueError: it is quantized and of a kind that is not served, or only some of the layers that it
                joins are quantized.
        """
        if isinstance(layer, LinearBase):
            return self._of_linear(prefix)
        if isinstance(layer, VocabParallelEmbedding):
            packed = self.choices.lm_head or self.choices.embeddings
            return SVDQVocabularyMethod(self.choices.scheme, self.heads) if packed else None
        within = [name for name in self.layers if name == prefix or name.startswith(f"{prefix}.")]
        if within:
            raise ValueError(
                f"{within[0]} is quantized, and in vLLM svdq serves linear layers, output heads and "
                f"embeddings only: {REMEDY}"
            )
        return None

    def _of_linear(self, prefix: str) -> QuantizeMethodBase:
        there = {name: name in self.layers for name in self._joined(prefix)}
        if len(set(there.values())) > 1:
            raise ValueError(f"{prefix} joins {there}: quantize all of them or none")
        return SVDQLinearMethod(self.choices.scheme) if any(there.values()) else UnquantizedLinearMethod()

    def _joined(self, prefix: str) -> list[str]:
        """The checkpoint's layers that a layer of vLLM joins."""
        path, _, leaf = prefix.rpartition(".")
        if prefix in self.layers or leaf not in self.packed_modules_mapping:
            return [prefix]
        return [f"{path}.{name}".lstrip(".") for name in self.packed_modules_mapping[leaf]]
