"""The plugin loads a checkpoint's layers as vLLM joins and divides them.

With vLLM installed its own layers are used, without it those of `vllm_stand_in`: the names of both are the
same. No engine is run (`tests/serving`).
"""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import llama
from vllm_layers import ATTENTION, MLP, PACKED, build, close, config_of, load, output, take

from svdq_hf import SVDQConfig, quantize_model
from svdq_hf.nn.inventory import svdq_layers


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


def test_a_layer_may_have_a_k_of_its_own(plugin, tmp_path):
    model = quantize_model(llama(), SVDQConfig(k=4, target_bits=9))
    model.save_pretrained(tmp_path)
    name = f"{MLP}.down_proj"
    layer = build(
        "RowParallelLinear", 96, 64, config=config_of(plugin, tmp_path), prefix=name, rank=0, size=1
    )
    load(layer, tmp_path, {name: None})
    assert layer.svdq_layers[0].salient_values.numel() == model.get_submodule(name).salient_values.numel()


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
