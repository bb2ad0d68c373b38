"""The plugin loads a checkpoint's layers as vLLM joins and divides them.

With vLLM installed its own layers are used, without it those of `vllm_stand_in`: the names of both are the
same. No engine is run.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import vllm_stand_in
from places import ROOT
from safetensors.torch import load_file
from tiny_models import llama, mixtral

from svdq_hf import SVDQConfig, quantize_model
from svdq_hf.nn.inventory import svdq_layers

LAYERS = "vllm.model_executor.layers"
PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
ATTENTION, MLP = "model.layers.0.self_attn", "model.layers.0.mlp"


@pytest.fixture(scope="module")
def plugin():
    with pytest.MonkeyPatch.context() as patch:
        vllm_stand_in.install(patch)
        patch.delitem(sys.modules, "svdq_hf.integrations.vllm.plugin", raising=False)
        from svdq_hf.integrations.vllm import plugin as vllm_plugin

        vllm_plugin.register()
        vllm_plugin.register()  # vLLM may load plugins more than once
        yield vllm_plugin
        sys.modules.pop("svdq_hf.integrations.vllm.plugin", None)


CHOICES = {
    "default": {"k": 32},
    "one column scale": {"k": 32, "column_scale": False},
    "8 bits": {"k": 0.01, "bits": 8},
}


@pytest.fixture(scope="module", params=CHOICES.values(), ids=CHOICES)
def checkpoint(request, tmp_path_factory):
    """The folder of a quantized model, and the dense matrices of its layers."""
    folder = tmp_path_factory.mktemp("quantized")
    model = quantize_model(llama(), SVDQConfig(**request.param))
    model.save_pretrained(folder)
    return folder, {name: layer.dequantize() for name, layer in svdq_layers(model)}


def config_of(plugin, folder: Path):
    stored = json.loads((folder / "config.json").read_text())["quantization_config"]
    config = plugin.SVDQVllmConfig.from_config(stored)
    config.maybe_update_config(str(folder))
    config.packed_modules_mapping = PACKED
    return config


def build(kind: str, *sizes: object, config: object, prefix: str, rank: int, size: int, **choices: object):
    linear = sys.modules[f"{LAYERS}.linear"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear, "get_tensor_model_parallel_rank", lambda: rank)
        patch.setattr(linear, "get_tensor_model_parallel_world_size", lambda: size)
        return getattr(linear, kind)(*sizes, bias=False, quant_config=config, prefix=prefix, **choices)


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


@pytest.mark.parametrize("size", [1, 2, 4])
def test_fused_attention_is_the_rows_of_q_k_and_v(plugin, checkpoint, size):
    """Four heads of 16, two of keys and values: of four devices, two share each of those."""
    folder, dense = checkpoint
    q, k, v = (dense[f"{ATTENTION}.{name}_proj"] for name in "qkv")
    x = torch.randn(3, 64)
    for rank in range(size):
        layer = build(
            "QKVParallelLinear", 64, 16, 4, 2, config=config_of(plugin, folder),
            prefix=f"{ATTENTION}.qkv_proj", rank=rank, size=size,
        )  # fmt: skip
        load(layer, folder, {f"{ATTENTION}.{name}_proj": name for name in "kvq"})
        heads = 2 * rank // size if size > 1 else slice(None)
        share = [q.chunk(size)[rank], *(one.chunk(2)[heads] if size > 1 else one for one in (k, v))]
        close(output(layer, x), x, torch.cat(share))
        assert not list(layer.parameters(recurse=False))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_fused_gate_and_up_are_a_share_of_each(plugin, checkpoint, size):
    folder, dense = checkpoint
    x = torch.randn(3, 64)
    for rank in range(size):
        layer = build(
            "MergedColumnParallelLinear", 64, [96, 96], config=config_of(plugin, folder),
            prefix=f"{MLP}.gate_up_proj", rank=rank, size=size,
        )  # fmt: skip
        load(layer, folder, {f"{MLP}.gate_proj": 0, f"{MLP}.up_proj": 1})
        share = [dense[f"{MLP}.{name}_proj"].chunk(size)[rank] for name in ("gate", "up")]
        close(output(layer, x), x, torch.cat(share))


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize(("name", "width"), [(f"{ATTENTION}.o_proj", 64), (f"{MLP}.down_proj", 96)])
def test_shares_of_divided_inputs_add_up(plugin, checkpoint, size, name, width):
    folder, dense = checkpoint
    x, total = torch.randn(3, width), torch.zeros(3, 64)
    for rank in range(size):
        layer = build(
            "RowParallelLinear", width, 64, config=config_of(plugin, folder), prefix=name, rank=rank,
            size=size, reduce_results=False,
        )  # fmt: skip
        load(layer, folder, {name: None})
        total += output(layer, x.chunk(size, dim=-1)[rank])
    close(total, x, dense[name])


@pytest.mark.parametrize("rank", [0, 1])
def test_undivided_layer_is_whole_on_each_device(plugin, checkpoint, rank):
    folder, dense = checkpoint
    name = f"{MLP}.up_proj"
    layer = build(
        "ReplicatedLinear", 64, 96, config=config_of(plugin, folder), prefix=name, rank=rank, size=2
    )
    load(layer, folder, {name: None})
    x = torch.randn(3, 64)
    close(output(layer, x), x, dense[name])


def test_joined_layer_that_is_not_divided_is_whole_on_each_device(plugin):
    layer = SimpleNamespace(prefix="both", svdq_heights=[8, 4], svdq_devices=1, tp_rank=1, tp_size=2)
    assert plugin.rows_of_rank(layer, 1, 4).tolist() == [0, 1, 2, 3]
    assert plugin.rows_of_rank(layer, None, 12).tolist() == list(range(12))
    assert plugin.rows_of_rank(layer, (0, 1), 12).tolist() == list(range(12))


def test_unknown_part_of_a_joined_layer_is_refused(plugin):
    layer = SimpleNamespace(prefix="qkv_proj", svdq_heights=[8], svdq_devices=1, tp_rank=0, tp_size=1)
    with pytest.raises(ValueError, match="qkv_proj: its part 'index_q' is none of"):
        plugin.rows_of_rank(layer, "index_q", 8)


def test_layers_that_are_one_in_the_file_are_divided(plugin, tmp_path):
    """As Phi-3's: the rows of all, and no word of which is which."""
    torch.manual_seed(0)
    fused = torch.nn.Sequential(torch.nn.Linear(64, 128, bias=False))
    quantize_model(fused, SVDQConfig(k=8))
    [layer] = (one for _, one in svdq_layers(fused))
    config = plugin.SVDQVllmConfig(SVDQConfig(k=8))
    config.layers, config.packed_modules_mapping = ["qkv_proj"], PACKED
    x, dense = torch.randn(3, 64), layer.dequantize()
    for rank in range(2):
        ours = build("QKVParallelLinear", 64, 16, 4, 2, config=config, prefix="qkv_proj", rank=rank, size=2)
        for name, part in layer.parts().items():
            take(ours, name, part)
        ours.quant_method.process_weights_after_loading(ours)
        share = [dense[:64].chunk(2)[rank], dense[64:96].chunk(2)[rank], dense[96:].chunk(2)[rank]]
        close(output(ours, x), x, torch.cat(share))


def test_dense_layers_stay_dense(plugin, checkpoint):
    config = config_of(plugin, checkpoint[0])
    layer = object.__new__(sys.modules[f"{LAYERS}.linear"].ReplicatedLinear)
    unquantized = sys.modules[f"{LAYERS}.linear"].UnquantizedLinearMethod
    if not vllm_stand_in.REAL:  # the real one asks for an engine's config
        assert type(config.get_quant_method(layer, "model.layers.0.router")) is unquantized
    assert type(config.get_quant_method(layer, f"{MLP}.down_proj")).__name__ == "SVDQLinearMethod"
    assert config.get_quant_method(torch.nn.Embedding(2, 2), "model.embed_tokens") is None


def test_vllm_finds_the_method_by_the_name_in_config_json(plugin):
    quantization = sys.modules[f"{LAYERS}.quantization"]
    found = quantization._CUSTOMIZED_METHOD_TO_QUANT_CONFIG if vllm_stand_in.REAL else vllm_stand_in._methods
    assert found["svdq"] is plugin.SVDQVllmConfig
    assert plugin.SVDQVllmConfig(SVDQConfig()).get_name() == "svdq"
    declared = (ROOT / "pyproject.toml").read_text()
    assert (
        '[project.entry-points."vllm.general_plugins"]\nsvdq = "svdq_hf.integrations.vllm.plugin:register"'
        in declared
    )


def test_half_quantized_fusion_is_refused(plugin, checkpoint):
    config = config_of(plugin, checkpoint[0])
    config.layers.remove(f"{ATTENTION}.k_proj")
    with pytest.raises(ValueError, match=r"qkv_proj joins .*k_proj': False.*quantize all of them or none"):
        build(
            "QKVParallelLinear", 64, 16, 4, 2, config=config, prefix=f"{ATTENTION}.qkv_proj", rank=0, size=1
        )


@pytest.mark.parametrize(
    ("build", "choice"),
    [(llama, {"lm_head": True}), (llama, {"embeddings": True}), (mixtral, {})],
    ids=["head", "embedding", "experts"],
)
def test_what_is_no_linear_layer_is_refused_with_the_remedy(build, choice, plugin, tmp_path):
    quantize_model(build(), SVDQConfig(k=4, **choice)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"linear layers only: quantize without lm_head.*svdq export"):
        config_of(plugin, tmp_path)


def test_a_layer_may_have_a_k_of_its_own(plugin, tmp_path):
    model = quantize_model(llama(), SVDQConfig(k=4, target_bits=9))
    model.save_pretrained(tmp_path)
    name = f"{MLP}.down_proj"
    layer = build(
        "RowParallelLinear", 96, 64, config=config_of(plugin, tmp_path), prefix=name, rank=0, size=1
    )
    load(layer, tmp_path, {name: None})
    assert layer.svdq_layers[0].salient_values.numel() == model.get_submodule(name).salient_values.numel()


def test_dense_folder_is_refused(plugin, tmp_path):
    llama().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no layer in its safetensors files is quantized by svdq"):
        plugin.SVDQVllmConfig(SVDQConfig()).maybe_update_config(str(tmp_path))


def test_missing_tensor_is_told_when_loading_ends(plugin, checkpoint):
    layer = build(
        "MergedColumnParallelLinear", 64, [96, 96], config=config_of(plugin, checkpoint[0]),
        prefix=f"{MLP}.gate_up_proj", rank=0, size=1,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"gate_up_proj joins 2 matrices, .* with all their tensors, \[0\]"):
        load(layer, checkpoint[0], {f"{MLP}.gate_proj": 0})


def test_damaged_tensor_is_told_by_layer(plugin, checkpoint):
    name = f"{MLP}.down_proj"
    layer = build(
        "RowParallelLinear", 96, 64, config=config_of(plugin, checkpoint[0]), prefix=name, rank=0, size=1
    )
    tensors = load_file(checkpoint[0] / "model.safetensors")
    tensors[f"{name}.salient_values"][0] = float("nan")
    for key in [key for key in tensors if not key.startswith(f"{name}.")]:
        del tensors[key]
    *rest, last = tensors
    for key in rest:
        take(layer, key.removeprefix(f"{name}."), tensors[key])
    with pytest.raises(ValueError, match=rf"{name} .*salient_values has a NaN"):
        take(layer, last.removeprefix(f"{name}."), tensors[last])


def test_matrix_of_another_height_is_refused(plugin, checkpoint):
    layer = build(
        "QKVParallelLinear", 64, 16, 8, 2, config=config_of(plugin, checkpoint[0]),
        prefix=f"{ATTENTION}.qkv_proj", rank=0, size=1,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"qkv_proj \(q\): 64 rows, where the model's config says 128"):
        load(layer, checkpoint[0], {f"{ATTENTION}.q_proj": "q"})


def test_layers_that_round_their_activations_are_refused(plugin):
    with pytest.raises(ValueError, match="activations=4: vLLM runs layers of svdq that round weights alone"):
        plugin.SVDQVllmConfig.from_config(SVDQConfig.resq().to_dict())
