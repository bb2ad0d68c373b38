"""What `vllm_plugin` uses of vLLM, in a few lines each, for machines without it.

Names, signatures and attributes are those of vLLM 0.33. Where the real package is there, `install` does
nothing, and the same tests run against it.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

REAL = importlib.util.find_spec("vllm") is not None

_methods: dict[str, Any] = {}


class QuantizationConfig:
    def __init__(self) -> None:
        self.packed_modules_mapping: dict[str, list[str]] = {}


class LinearMethodBase:
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


def register_quantization_config(name: str) -> Any:
    return lambda config: _methods.setdefault(name, config)


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
    f"{_LAYERS}.quantization.base_config": (QuantizationConfig,),
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
