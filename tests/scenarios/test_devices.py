"""Where the parts of a quantized model are: offloaded, spread over a device_map, as far as a CPU can show."""

import accelerate
import pytest
import tiny_models as tiny
import torch
import transformers as hf

from svdq_hf import SVDQConfig, quantize_model

CONFIG = SVDQConfig(k=16, rank=2)
FAMILIES = ["bert", "llama-untied", "gpt2"]
EVERY_CHOICE = {
    "layers": CONFIG,
    "head and embedding": SVDQConfig(k=16, rank=2, lm_head=True, embeddings=True),
    "budget": SVDQConfig(rank=2, target_bits=7),
}


def saved(tmp_path, config=CONFIG, family="llama-untied"):
    """A quantized model, and the folder that it is in."""
    model = quantize_model(tiny.FAMILIES[family].loud_model(), config)
    model.save_pretrained(tmp_path / "quantized")
    return model, tmp_path / "quantized"


def outputs(model, family="llama-untied"):
    return tiny.outputs(model, tiny.FAMILIES[family].inputs())


@pytest.mark.parametrize("buffers", [False, True], ids=["parameters", "and-buffers"])
@pytest.mark.parametrize("family", FAMILIES)
def test_parts_that_wait_on_the_cpu_are_brought_for_the_forward_pass(family, buffers, tmp_path):
    """accelerate's hooks, as for a GPU; the device that they bring parts to is the CPU here."""
    model, _ = saved(tmp_path, family=family)
    before = outputs(model, family)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=buffers)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(outputs(model, family), before)
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("choice", EVERY_CHOICE)
def test_auto_with_too_little_memory_puts_the_rest_on_disk(choice, tmp_path):
    model, folder = saved(tmp_path, EVERY_CHOICE[choice])
    places = {"device_map": "auto", "max_memory": {"cpu": "30KB"}, "offload_folder": tmp_path / "offload"}
    again = hf.LlamaForCausalLM.from_pretrained(folder, **places)
    assert "disk" in again.hf_device_map.values()
    assert torch.equal(outputs(again), outputs(model))


@pytest.mark.parametrize("choice", EVERY_CHOICE)
def test_an_explicit_map_gives_the_same_model(choice, tmp_path):
    model, folder = saved(tmp_path, EVERY_CHOICE[choice])
    places = dict.fromkeys(["model.embed_tokens", "model.layers", "model.norm", "model.rotary_emb"], "cpu")
    again = hf.LlamaForCausalLM.from_pretrained(folder, device_map=places | {"lm_head": "cpu"})
    assert tiny.different_tensors(again, model) == []


@pytest.mark.parametrize("choice", EVERY_CHOICE)
def test_on_the_fly_a_map_of_one_device_changes_nothing(choice, tmp_path):
    model, _ = saved(tmp_path, EVERY_CHOICE[choice])
    tiny.FAMILIES["llama-untied"].loud_model().save_pretrained(tmp_path / "dense")
    loaded = hf.LlamaForCausalLM.from_pretrained(
        tmp_path / "dense", quantization_config=EVERY_CHOICE[choice], device_map="cpu"
    )
    assert tiny.different_tensors(loaded, model) == []


def test_on_the_fly_auto_that_would_spill_to_disk_is_refused(tmp_path):
    tiny.FAMILIES["llama-untied"].loud_model().save_pretrained(tmp_path / "dense")
    places = {"device_map": "auto", "max_memory": {"cpu": "60KB"}, "offload_folder": tmp_path / "offload"}
    with pytest.raises(ValueError, match=r"on disk, which cannot be quantized while loading"):
        hf.LlamaForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=CONFIG, **places)


def test_a_model_that_is_spread_is_not_quantized_in_memory(tmp_path):
    dense = tiny.FAMILIES["llama-untied"].loud_model()
    dense.save_pretrained(tmp_path / "dense")
    places = {"device_map": {"model": "cpu", "lm_head": "disk"}, "offload_folder": tmp_path / "offload"}
    model = hf.LlamaForCausalLM.from_pretrained(tmp_path / "dense", **places)
    with pytest.raises(ValueError, match=r"spread over devices by its device_map: load it without one"):
        quantize_model(model, CONFIG)
