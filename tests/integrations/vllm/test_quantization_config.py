"""Which of a model's layers the plugin's config gives which method, and what it refuses."""

import sys

import pytest
import torch
import vllm_stand_in
from tiny_models import llama, mixtral
from vllm_layers import ATTENTION, LAYERS, MLP, build, config_of

from svdq_hf import SVDQConfig, quantize_model


def test_dense_layers_stay_dense(plugin, checkpoint):
    config = config_of(plugin, checkpoint[0])
    layer = object.__new__(sys.modules[f"{LAYERS}.linear"].ReplicatedLinear)
    unquantized = sys.modules[f"{LAYERS}.linear"].UnquantizedLinearMethod
    if not vllm_stand_in.REAL:  # the real one asks for an engine's config
        assert type(config.get_quant_method(layer, "model.layers.0.router")) is unquantized
    assert type(config.get_quant_method(layer, f"{MLP}.down_proj")).__name__ == "SVDQLinearMethod"
    assert config.get_quant_method(torch.nn.Embedding(2, 2), "model.embed_tokens") is None


def test_half_quantized_fusion_is_refused(plugin, checkpoint):
    config = config_of(plugin, checkpoint[0])
    config.layers.remove(f"{ATTENTION}.k_proj")
    with pytest.raises(ValueError, match=r"qkv_proj joins .*k_proj': False.*quantize all of them or none"):
        build(
            "QKVParallelLinear", 64, 16, 4, 2, config=config, prefix=f"{ATTENTION}.qkv_proj", rank=0, size=1
        )


def test_dense_folder_is_refused(plugin, tmp_path):
    llama().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no layer in its safetensors files is quantized by svdq"):
        plugin.SVDQVllmConfig(SVDQConfig()).maybe_update_config(str(tmp_path))


def test_experts_are_refused_with_the_remedy(plugin, tmp_path):
    quantize_model(mixtral(), SVDQConfig(k=4)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"its experts are quantized.*modules_to_not_convert.*svdq export"):
        config_of(plugin, tmp_path)


def test_quantized_layer_of_another_kind_is_refused(plugin, checkpoint):
    config = config_of(plugin, checkpoint[0])
    with pytest.raises(ValueError, match=rf"{MLP}.down_proj is quantized.*embeddings only.*svdq export"):
        config.get_quant_method(torch.nn.Linear(2, 2), MLP)
