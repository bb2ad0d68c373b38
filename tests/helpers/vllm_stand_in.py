"""What the vLLM plugin uses of vLLM, in a few lines each, for machines without it.

Names, signatures and attributes are those of vLLM 0.32 and 0.33. Where the real package is there, `install`
does nothing, and the same tests run against it.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

REAL = importlib.util.find_spec("vllm") is not None

_methods: dict[str, Any] = {}


class QuantizationConfig:
    def __init__(self) -> None:
        self.packed_modules_mapping: dict[str, list[str]] = {}


class QuantizeMethodBase:
    pass


class LinearMethodBase(QuantizeMethodBase):
    pass


class UnquantizedLinearMethod(LinearMethodBase):
    def create_weights(self, layer: nn.Module, *sizes: Any, **attributes: Any) -> None:
        pass


def get_tensor_model_parallel_rank() -> int:
    return 0


def get_tensor_model_parallel_world_size() -> int:
    return 1


def _group() -> tuple[int, int]:
    module = sys.modules[f"{_LAYERS}.linear"]
    return module.get_tensor_model_parallel_rank(), module.get_tensor_model_parallel_world_size()


class LinearBase(nn.Module):
    def _make(
        self, inputs: int, total: int, heights: list[int], outputs: int, config: Any, prefix: str
    ) -> None:
        super().__init__()
        self.tp_rank, self.tp_size = _group()
        self.prefix, self.bias = prefix, None
        self.input_size, self.input_size_per_partition = total, inputs
        self.output_partition_sizes = heights
        self.quant_method = config.get_quant_method(self, prefix)
        self.quant_method.create_weights(
            self, inputs, heights, total, outputs, torch.float32, weight_loader=None
        )

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return self.quant_method.apply(self, x, None), None

    def load_weights(self, weights: Any) -> list[str]:
        loaded = []
        for name, tensor in weights:
            place = getattr(self, name)
            place.weight_loader(place, tensor, getattr(tensor, "shard_id", None))
            loaded.append(name)
        return loaded


class ReplicatedLinear(LinearBase):
    def __init__(
        self, input_size: int, output_size: int, bias: bool = True, *, quant_config: Any, prefix: str
    ) -> None:
        self._make(input_size, input_size, [output_size], output_size, quant_config, prefix)


class ColumnParallelLinear(LinearBase):
    def __init__(
        self, input_size: int, output_size: int, bias: bool = True, *, quant_config: Any, prefix: str
    ) -> None:
        heights = [size // _group()[1] for size in getattr(self, "_sizes", [output_size])]
        self._make(input_size, input_size, heights, output_size, quant_config, prefix)


class MergedColumnParallelLinear(ColumnParallelLinear):
    def __init__(
        self, input_size: int, output_sizes: list[int], bias: bool = True, *, quant_config: Any, prefix: str
    ) -> None:
        object.__setattr__(self, "_sizes", output_sizes)
        super().__init__(input_size, sum(output_sizes), bias, quant_config=quant_config, prefix=prefix)


class QKVParallelLinear(ColumnParallelLinear):
    def __init__(
        self,
        hidden_size: int,
        head_size: int,
        total_num_heads: int,
        total_num_kv_heads: int,
        bias: bool = True,
        *,
        quant_config: Any,
        prefix: str,
    ) -> None:
        size = _group()[1]
        replicas = max(1, size // total_num_kv_heads)
        object.__setattr__(self, "num_kv_head_replicas", replicas)
        sizes = [head_size * heads for heads in (total_num_heads, *[total_num_kv_heads * replicas] * 2)]
        object.__setattr__(self, "_sizes", sizes)
        super().__init__(hidden_size, sum(sizes), bias, quant_config=quant_config, prefix=prefix)


class RowParallelLinear(LinearBase):
    def __init__(
        self,
        input_size: int,
        output_size: int,
        bias: bool = True,
        *,
        reduce_results: bool = True,
        quant_config: Any,
        prefix: str,
    ) -> None:
        width = input_size // _group()[1]
        self._make(width, input_size, [output_size], output_size, quant_config, prefix)


class VocabParallelEmbedding(nn.Module):
    """Padded to a multiple of 64; each device has as many rows, of which the last ones' are padding."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        params_dtype: torch.dtype = torch.float32,
        *,
        quant_config: Any,
        prefix: str,
    ) -> None:
        super().__init__()
        module = sys.modules[f"{_LAYERS}.vocab_parallel_embedding"]
        self.tp_rank = module.get_tensor_model_parallel_rank()
        self.tp_size = module.get_tensor_model_parallel_world_size()
        self.prefix, self.org_vocab_size, self.params_dtype = prefix, num_embeddings, params_dtype
        padded = -(-num_embeddings // 64) * 64
        height = self.num_embeddings_per_partition = padded // self.tp_size
        start, stop = (min((self.tp_rank + step) * height, num_embeddings) for step in (0, 1))
        self.shard_indices = SimpleNamespace(org_vocab_start_index=start, org_vocab_end_index=stop)
        self.quant_method = quant_config.get_quant_method(self, prefix)
        self.quant_method.create_weights(
            self, embedding_dim, [height], embedding_dim, padded, params_dtype=params_dtype
        )


class ParallelLMHead(VocabParallelEmbedding):
    pass


class UnquantizedEmbeddingMethod(QuantizeMethodBase):
    def process_weights_after_loading(self, layer: Any) -> None:
        pass

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return nn.functional.linear(x, layer.weight, bias)

    def embedding(self, layer: Any, ids: torch.Tensor) -> torch.Tensor:
        return nn.functional.embedding(ids, layer.weight)


def register_quantization_config(name: str) -> Any:
    return lambda config: _methods.__setitem__(name, config)


def get_quantization_config(name: str) -> Any:
    return _methods[name]


def get_safetensors_params_metadata(model: str, *, revision: str | None = None) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for file in Path(model).glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            found |= dict.fromkeys(opened.keys())
    return found


_LAYERS = "vllm.model_executor.layers"
_CONTENT: dict[str, tuple[Any, ...]] = {
    f"{_LAYERS}.linear": (
        LinearBase, LinearMethodBase, UnquantizedLinearMethod, ReplicatedLinear, ColumnParallelLinear,
        MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear,
        get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size,
    ),
    f"{_LAYERS}.quantization": (register_quantization_config, get_quantization_config),
    f"{_LAYERS}.quantization.base_config": (QuantizationConfig, QuantizeMethodBase),
    f"{_LAYERS}.vocab_parallel_embedding": (
        ParallelLMHead, UnquantizedEmbeddingMethod, VocabParallelEmbedding,
        get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size,
    ),
    "vllm.transformers_utils.config": (get_safetensors_params_metadata,),
}  # fmt: skip


def install(patch: Any) -> None:
    """Put the stand-in where vLLM would be, as long as `patch` (a MonkeyPatch) lasts."""
    if REAL:
        return
    for path, content in _CONTENT.items():
        module = ModuleType(path)
        for one in content:
            setattr(module, one.__name__, one)
        parents = path.split(".")
        for depth in range(1, len(parents)):
            parent = ".".join(parents[:depth])
            if parent not in sys.modules:
                patch.setitem(sys.modules, parent, ModuleType(parent))
        patch.setitem(sys.modules, path, module)
    sys.modules["vllm"].__version__ = "0.33.0"  # type: ignore[attr-defined]
