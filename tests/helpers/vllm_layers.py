"""Layers of vLLM, or of its stand-in, made and loaded as vLLM does it."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

LAYERS = "vllm.model_executor.layers"
PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
ATTENTION, MLP = "model.layers.0.self_attn", "model.layers.0.mlp"


def config_of(plugin, folder: Path):
    stored = json.loads((folder / "config.json").read_text())["quantization_config"]
    config = plugin.SVDQVllmConfig.from_config(stored)
    config.maybe_update_config(str(folder))
    config.packed_modules_mapping = PACKED
    return config


def build(kind: str, *sizes: object, config: object, prefix: str, rank: int, size: int, **choices: object):
    linear = sys.modules[f"{LAYERS}.linear"]
    with ranked(linear, rank, size):
        return getattr(linear, kind)(*sizes, bias=False, quant_config=config, prefix=prefix, **choices)


def build_vocabulary(kind: str, *sizes: int, config: object, prefix: str, rank: int, size: int):
    module = sys.modules[f"{LAYERS}.vocab_parallel_embedding"]
    with ranked(module, rank, size):
        return getattr(module, kind)(*sizes, quant_config=config, prefix=prefix, params_dtype=torch.float32)


@contextmanager
def ranked(module: ModuleType, rank: int, size: int) -> Iterator[None]:
    """As the process of one rank of several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "get_tensor_model_parallel_rank", lambda: rank)
        patch.setattr(module, "get_tensor_model_parallel_world_size", lambda: size)
        yield


def load(layer, folder: Path, shards: dict[str, object]) -> None:
    """As vLLM's loader does: by the layer's own `load_weights`, or tensor by tensor."""
    tensors = load_file(folder / "model.safetensors")
    chosen = []
    for source, shard in shards.items():
        for name, tensor in tensors.items():
            if name.startswith(f"{source}."):
                tensor.shard_id = shard
                chosen.append((name.removeprefix(f"{source}."), tensor))
    if None in shards.values():
        for name, tensor in chosen:
            take(layer, name, tensor)
    else:
        assert len(list(layer.load_weights(chosen))) == len(chosen)
    layer.quant_method.process_weights_after_loading(layer)


def take(layer, name: str, tensor: torch.Tensor) -> None:
    place = getattr(layer, name)
    place.weight_loader(place, tensor)


def output(layer, x: torch.Tensor) -> torch.Tensor:
    y = layer(x)
    return y[0] if isinstance(y, tuple) else y


def close(y: torch.Tensor, x: torch.Tensor, matrix: torch.Tensor) -> None:
    torch.testing.assert_close(y, x @ matrix.T, rtol=1e-5, atol=1e-5)
