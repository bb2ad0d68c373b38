"""Whatever is wrong with stored experts, or the file they are made from, ends in an error that says so."""

import re
import shutil

import pytest
import tiny_experts
import torch
import transformers as hf
from damaged import Saved
from safetensors.torch import save_file

from svdq_hf import SVDQConfig, quantize_model, read_footprint
from svdq_hf.checkpoint import quantize_checkpoint
from svdq_hf.config import checks as validation
from svdq_hf.format.versions import EXPERTS_VERSION, FORMAT_VERSION
from svdq_hf.integrations.transformers.quantizer import SVDQHfQuantizer
from svdq_hf.nn.inventory import svdq_experts

CONFIG = SVDQConfig(k=32)
STACK = "model.layers.1.mlp.experts.down_proj"
AGAIN = "quantize the original model again"


class Folder(Saved):
    """A copy of a saved Qwen3-MoE, to be damaged."""

    def load(self, **choices):
        return hf.Qwen3MoeForCausalLM.from_pretrained(self.write(), **choices)

    def refused(self, *fragments, **choices):
        with pytest.raises(ValueError, match="experts") as error:
            self.load(**choices)
        assert [fragment for fragment in fragments if fragment not in str(error.value)] == [], error.value


def key(part):
    return STACK if part == "weight" else f"{STACK}_{part}"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder, model = tmp_path_factory.mktemp("experts"), tiny_experts.build("qwen3-moe")
    model.save_pretrained(folder / "dense")
    keep = SVDQConfig(k=32, modules_to_not_convert=[f"{name}_proj" for name in "qkvo"])
    model.from_pretrained(folder / "dense", quantization_config=keep).save_pretrained(folder / "quantized")
    return folder


@pytest.fixture
def stored(folders, tmp_path):
    return Folder(shutil.copytree(folders / "quantized", tmp_path / "quantized"))


@pytest.fixture
def dense(folders, tmp_path):
    return Folder(shutil.copytree(folders / "dense", tmp_path / "dense"))


def test_the_undamaged_folder_loads(stored, dense):
    assert len(list(svdq_experts(stored.load()))) == 2
    assert len(list(svdq_experts(dense.load(quantization_config=CONFIG)))) == 2


PARTS = ["weight", "weight_scale", "salient_values", "salient_rows", "salient_columns", "row_scale", "levels"]


@pytest.mark.parametrize("part", PARTS)
def test_a_missing_part_is_named(part, stored):
    del stored.tensors[key(part)]
    stored.refused(STACK, f"{part} is missing", AGAIN)


def test_experts_that_are_missing_as_a_whole_are_named(stored):
    for name in [name for name in stored.tensors if name.startswith("model.layers.1.mlp.experts.")]:
        del stored.tensors[name]
    stored.refused("model.layers.1.mlp.experts", AGAIN)


def test_one_matrix_that_is_dense_is_named(stored):
    for part in PARTS:
        del stored.tensors[key(part)]
    del stored.tensors[key("column_scale")]
    stored.tensors[STACK] = torch.randn(4, 64, 96)
    stored.refused(STACK, AGAIN)


@pytest.mark.parametrize("part", PARTS)
def test_a_wrong_shape_is_told(part, stored):
    stored.tensors[key(part)] = stored.tensors[key(part)][:-1].contiguous()
    stored.refused(STACK, f"{part} is [3, ", "where the config says [4, ")


def test_a_wrong_dtype_is_told(stored):
    stored.tensors[key("salient_rows")] = stored.tensors[key("salient_rows")].long()
    stored.refused(STACK, "salient_rows is [4, 32] torch.int64", "[4, 32] torch.int32")


def test_a_part_that_no_config_asks_for_is_named(stored):
    stored.tensors[key("zero_point")] = torch.zeros(4)
    stored.refused(STACK, "zero_point")


def out_of_range(tensors):
    tensors[key("salient_columns")][2, 5] = 96
    return "salient_columns has 96"


def below(tensors):
    tensors[key("salient_rows")][2, 0] = -1
    return "salient_rows has -1"


def twice(tensors):
    tensors[key("salient_rows")][2, 1] = tensors[key("salient_rows")][2, 0]
    tensors[key("salient_columns")][2, 1] = tensors[key("salient_columns")][2, 0]
    return "out of order"


def not_a_number(tensors):
    tensors[key("salient_values")][2, 7] = float("nan")
    return "salient_values has a NaN"


def zero_level(tensors):
    tensors[key("levels")][2, 8] = 3
    return "levels has 3 for code zero"


@pytest.mark.parametrize("damage", [out_of_range, below, twice, not_a_number, zero_level])
def test_nonsense_is_told_with_its_expert(damage, stored):
    stored.refused(f"{STACK}, expert 2: ", damage(stored.tensors), AGAIN)


def test_a_loader_that_knows_no_packed_experts_stops(stored, caplog):
    del stored.config["quantization_config"]
    with pytest.raises(RuntimeError, match="mismatched_sizes"):
        stored.load()
    assert "mlp.experts.down_proj " in caplog.text
    assert "MISMATCH" in caplog.text


def test_a_state_dict_without_a_part_is_refused(stored):
    model_class, tensors = hf.Qwen3MoeForCausalLM, stored.load().state_dict()
    del tensors[key("salient_rows")]
    with pytest.raises(ValueError, match="down_proj_salient_rows is missing"):
        model_class.from_pretrained(
            None, config=hf.AutoConfig.from_pretrained(stored.folder), state_dict=tensors
        )


# A dense file.


@pytest.mark.parametrize("piece", ["gate_proj", "up_proj", "down_proj"])
def test_an_expert_that_is_missing_is_an_error(piece, dense):
    name = f"model.layers.1.mlp.experts.2.{piece}.weight"
    del dense.tensors[name]
    dense.refused(f"{name} is missing", "download or copy the model again", quantization_config=CONFIG)


@pytest.mark.parametrize("piece", ["gate_proj", "down_proj"])
@pytest.mark.parametrize("way", ["short", "transposed"])
def test_an_expert_of_another_shape_than_the_others_is_told(way, piece, dense, tmp_path):
    name = f"model.layers.1.mlp.experts.2.{piece}.weight"
    usual = list(dense.tensors[name].shape)
    odd = dense.tensors[name].T if way == "transposed" else dense.tensors[name][:-1]
    dense.tensors[name] = odd.contiguous()
    told = f"{name} is {list(odd.shape)}, and this tensor of other experts {usual}"
    dense.refused(told, "download or copy the model again", quantization_config=CONFIG)
    with pytest.raises(ValueError, match=re.escape(told)):
        quantize_checkpoint(dense.write(), tmp_path / "out", CONFIG)
    assert not (tmp_path / "out").exists()


def test_a_missing_last_expert_is_told_with_both_shapes(dense):
    for piece in ("gate_proj", "up_proj"):
        del dense.tensors[f"model.layers.1.mlp.experts.3.{piece}.weight"]
    name = "model.layers.1.mlp.experts.gate_up_proj"
    dense.refused(name, "[3, 192, 64]", "[4, 192, 64]", quantization_config=CONFIG)


def test_a_nan_is_told_with_its_expert(dense):
    dense.tensors["model.layers.1.mlp.experts.2.up_proj.weight"][0, 0] = float("nan")
    told = "model.layers.1.mlp.experts.gate_up_proj, expert 2"
    dense.refused(told, "NaN", quantization_config=CONFIG)
    with pytest.raises(ValueError, match=told):
        quantize_model(dense.load(), CONFIG)


def test_experts_that_are_no_plain_floats_are_told(dense):
    name = "model.layers.1.mlp.experts.3.down_proj.weight"
    dense.tensors[name] = dense.tensors[name].to(torch.float8_e4m3fn)
    dense.refused(STACK, "float8_e4m3fn", quantization_config=CONFIG)


def test_experts_of_another_shape_are_told(dense):
    for expert in range(4):
        name = f"model.layers.1.mlp.experts.{expert}.down_proj.weight"
        dense.tensors[name] = dense.tensors[name][:, :64].contiguous()
    dense.refused(STACK, "[4, 64, 64]", "[4, 64, 96]", quantization_config=CONFIG)


def test_a_quantized_model_is_not_quantized_again(stored):
    with pytest.raises(ValueError, match="quantized already, by svdq"):
        quantize_model(stored.load(), CONFIG)
    del stored.config["quantization_config"]
    stored.refused("quantized already, by svdq", quantization_config=CONFIG)


# The format's version.


def test_only_models_with_quantized_experts_are_of_the_new_version(stored, dense):
    assert stored.config["quantization_config"]["format_version"] == EXPERTS_VERSION
    config = SVDQConfig(k=32, modules_to_not_convert=["experts"])
    assert dense.load(quantization_config=config).config.quantization_config.format_version == 2
    assert CONFIG.format_version == 2
    again = SVDQConfig.from_dict(stored.config["quantization_config"])
    assert SVDQConfig.from_dict(again.to_dict()).format_version == EXPERTS_VERSION <= FORMAT_VERSION


def test_a_release_that_knows_no_experts_refuses_them(stored, monkeypatch):
    monkeypatch.setattr(validation, "FORMAT_VERSION", EXPERTS_VERSION - 1)
    with pytest.raises(ValueError, match="this release of svdq_hf reads up to 3"):
        stored.load()


def test_a_model_of_an_older_release_has_dense_experts(dense, tmp_path):
    """As it wrote them: linear layers quantized, experts as they were, version 2."""
    config = SVDQConfig(k=32, modules_to_not_convert=["experts"])
    model = dense.load(quantization_config=config)
    older = model.config.quantization_config.replace(modules_to_not_convert=None)
    model.config.quantization_config = older
    model.save_pretrained(tmp_path / "old")
    again = hf.Qwen3MoeForCausalLM.from_pretrained(tmp_path / "old")
    assert not any(svdq_experts(again))
    assert torch.equal(tiny_experts.output(again), tiny_experts.output(model))


# A folder's footprint, of strangers' files.


@pytest.mark.parametrize("part", ["weight", "salient_values"])
def test_a_footprint_of_a_broken_stack_is_refused(part, stored):
    stored.tensors[key(part)] = stored.tensors[key(part)].reshape(-1)
    save_file(stored.tensors, stored.file, stored.metadata)
    with pytest.raises(ValueError, match="no stacks of experts"):
        read_footprint(stored.folder)


def test_compiling_is_not_refused(stored):
    assert isinstance(stored.load().hf_quantizer, SVDQHfQuantizer)
    assert stored.load().hf_quantizer.is_compileable
