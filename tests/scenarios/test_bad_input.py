"""Whatever is wrong with a checkpoint, a config or a model ends in one exception that says so."""

import json
import shutil

import pytest
import tiny_models as tiny
import torch
import transformers as hf
from damaged import Saved
from torch import nn

from svdq_hf import (
    SVDQConfig,
    SVDQLinear,
    dequantize_model,
    mark_trainable,
    quantize_model,
    register_saliency,
)
from svdq_hf.core import saliency
from svdq_hf.format.metadata import METADATA_KEY
from svdq_hf.format.parts import part_specs
from svdq_hf.nn.inventory import svdq_layers

CONFIG = SVDQConfig(k=32)
LAYER = "encoder.layer.1.attention.self.key"
PARTS = ["weight", "weight_scale", "salient_values", "salient_rows", "salient_columns"]
AGAIN = "quantize the original model again"


class Folder(Saved):
    """A copy of a saved model, one layer of which is to be damaged."""

    def part(self, name):
        return self.tensors[f"{LAYER}.{name}"]

    def replace(self, name, tensor):
        self.tensors[f"{LAYER}.{name}"] = tensor.contiguous()
        return self.write()


@pytest.fixture(scope="module")
def dense_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    tiny.bert().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def quantized_folder(dense_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantized")
    hf.BertModel.from_pretrained(dense_folder, quantization_config=CONFIG).save_pretrained(folder)
    return folder


@pytest.fixture
def dense(dense_folder, tmp_path):
    return Folder(shutil.copytree(dense_folder, tmp_path / "dense"))


@pytest.fixture
def stored(quantized_folder, tmp_path):
    return Folder(shutil.copytree(quantized_folder, tmp_path / "quantized"))


def load(folder, **choices):
    return hf.BertModel.from_pretrained(folder, **choices)


def on_the_fly(folder, config=CONFIG, model_class=hf.BertModel, **choices):
    return model_class.from_pretrained(folder, quantization_config=config, **choices)


def assert_says(error, *fragments):
    text = str(error.value)
    assert [fragment for fragment in fragments if fragment not in text] == [], text


def refused_by_transformers(caplog, name, folder, **choices):
    """transformers refuses a wrong shape itself; its exception points to its report, which has the name."""
    with pytest.raises(RuntimeError, match=r"mismatched_sizes.*above report"):
        load(folder, **choices)
    assert name in caplog.text


def test_the_undamaged_folder_loads(stored, dense):
    assert len(list(svdq_layers(load(stored.write())))) == 13
    assert len(list(svdq_layers(on_the_fly(dense.write())))) == 13


# A quantized file: tensors.


@pytest.mark.parametrize("part", PARTS)
def test_a_missing_part_is_named(part, stored):
    del stored.tensors[f"{LAYER}.{part}"]
    with pytest.raises(ValueError, match="is missing") as error:
        load(stored.write())
    assert_says(error, LAYER, f": {part} is missing", AGAIN)


@pytest.mark.parametrize("part", PARTS)
def test_a_missing_part_of_a_layer_on_disk_is_named(part, stored, tmp_path):
    del stored.tensors[f"{LAYER}.{part}"]
    places = {"embeddings": "cpu", "encoder.layer.0": "cpu", "encoder.layer.1": "disk", "pooler": "cpu"}
    with pytest.raises(ValueError, match="missing") as error:
        load(stored.write(), device_map=places, offload_folder=tmp_path / "offload")
    assert_says(error, LAYER, part)


def test_a_missing_bias_is_named(stored):
    del stored.tensors[f"{LAYER}.bias"]
    with pytest.raises(ValueError, match="bias is missing") as error:
        load(stored.write())
    assert_says(error, LAYER, AGAIN)


def test_a_missing_bias_of_a_dense_layer_is_named(dense):
    del dense.tensors[f"{LAYER}.bias"]
    with pytest.raises(ValueError, match="bias is missing") as error:
        on_the_fly(dense.write())
    assert_says(error, LAYER, "modules_to_not_convert keeps it dense")


def test_a_layer_that_is_missing_as_a_whole_is_named(stored):
    for part in PARTS:
        del stored.tensors[f"{LAYER}.{part}"]
    with pytest.raises(ValueError, match="missing") as error:
        load(stored.write())
    assert_says(error, LAYER, AGAIN)


@pytest.mark.parametrize("name", ["weight_zero_point", "weight_levels", "salient_blocks"])
def test_a_part_that_no_config_asks_for_is_named(name, stored):
    with pytest.raises(ValueError, match=name) as error:
        load(stored.replace(name, torch.ones(64, 1)))
    assert_says(error, LAYER)


def cut_row(tensor):
    return tensor[:-1]


def one_more_column(tensor):
    return torch.cat([tensor, tensor[..., -1:]], dim=-1)


def one_more_dimension(tensor):
    return tensor[None]


@pytest.mark.parametrize("change", [cut_row, one_more_column, one_more_dimension])
@pytest.mark.parametrize("part", PARTS)
def test_a_part_of_wrong_shape_is_named(part, change, stored):
    folder = stored.replace(part, change(stored.part(part)))
    with pytest.raises(ValueError, match="where the config says") as error:
        load(folder)
    assert_says(error, f"{LAYER}: {part} is ", AGAIN)


@pytest.mark.parametrize("part", PARTS)
def test_a_part_of_wrong_shape_is_named_even_if_mismatches_are_ignored(part, stored):
    folder = stored.replace(part, cut_row(stored.part(part)))
    with pytest.raises(ValueError, match=r"missing|where the config says") as error:
        load(folder, ignore_mismatched_sizes=True)
    assert_says(error, LAYER, part, AGAIN)


@pytest.mark.parametrize(
    ("part", "dtype"),
    [
        ("weight", torch.uint8),
        ("weight", torch.int32),
        ("weight", torch.float32),
        ("weight_scale", torch.float32),
        ("weight_scale", torch.float16),
        ("weight_scale", torch.int16),
        ("salient_values", torch.bfloat16),
        ("salient_values", torch.float16),
        ("salient_values", torch.float64),
        ("salient_values", torch.int32),
        ("salient_rows", torch.int64),
        ("salient_rows", torch.int16),
        ("salient_rows", torch.float32),
        ("salient_columns", torch.int64),
        ("salient_columns", torch.uint8),
        ("salient_columns", torch.bfloat16),
    ],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_a_part_of_wrong_dtype_is_named(part, dtype, stored):
    folder = stored.replace(part, stored.part(part).to(dtype))
    with pytest.raises(ValueError, match=str(dtype)) as error:
        load(folder)
    assert_says(error, LAYER, part, str(part_specs(64, 64, CONFIG.scheme)[part].dtype), AGAIN)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("part", ["row_scale", "column_scale", "salient_values"])
def test_a_number_that_is_none_is_named(part, value, stored):
    tensor = stored.part(part)
    tensor.view(-1)[3] = value
    with pytest.raises(ValueError, match="a NaN or an infinity") as error:
        load(stored.replace(part, tensor))
    assert_says(error, LAYER, part, AGAIN)


@pytest.mark.parametrize("value", [-1, 64, 2**31 - 1], ids=["negative", "one-too-far", "largest"])
@pytest.mark.parametrize("part", ["salient_rows", "salient_columns"])
def test_a_position_outside_of_the_weight_is_named(part, value, stored):
    positions = stored.part(part)
    positions[-1] = value
    with pytest.raises(ValueError, match=r"not in 0\.\.63") as error:
        load(stored.replace(part, positions))
    assert_says(error, LAYER, part, str(value), AGAIN)


def test_a_position_that_is_there_twice_is_refused(stored):
    for part in ("salient_rows", "salient_columns"):
        positions = stored.part(part)
        positions[4] = positions[5]
        folder = stored.replace(part, positions)
    with pytest.raises(ValueError, match="one is there twice") as error:
        load(folder)
    assert_says(error, LAYER, AGAIN)


def test_positions_out_of_order_are_refused(stored):
    for part in ("salient_values", "salient_rows", "salient_columns"):
        folder = stored.replace(part, stored.part(part).flip(0))
    with pytest.raises(ValueError, match="out of order") as error:
        load(folder)
    assert_says(error, LAYER, AGAIN)


def test_a_code_under_a_salient_weight_is_refused(stored):
    # 8 in both nibbles is the code zero; -1 is the code 7 twice.
    with pytest.raises(ValueError, match="not zero at a salient position") as error:
        load(stored.replace("weight", torch.full_like(stored.part("weight"), -1)))
    assert_says(error, LAYER, AGAIN)


@pytest.fixture(params=[3, 8])
def other_bits(request, dense_folder, tmp_path):
    """A folder of codes of other than 4 bits."""
    on_the_fly(dense_folder, SVDQConfig(k=32, bits=request.param)).save_pretrained(tmp_path / "other")
    return Folder(tmp_path / "other")


def flat(tensor):
    return tensor.flatten(1)


@pytest.mark.parametrize("change", [cut_row, one_more_column, one_more_dimension, flat])
def test_packed_rows_of_other_bits_of_wrong_shape_are_named(change, other_bits):
    folder = other_bits.replace("weight", change(other_bits.part("weight")))
    with pytest.raises(ValueError, match="where the config says") as error:
        load(folder)
    assert_says(error, f"{LAYER}: weight is ", AGAIN)


def test_a_code_of_other_bits_under_a_salient_weight_is_refused(other_bits):
    with pytest.raises(ValueError, match="not zero at a salient position") as error:
        load(other_bits.replace("weight", torch.full_like(other_bits.part("weight"), -1)))
    assert_says(error, LAYER, AGAIN)


def test_other_bits_than_the_config_says_are_refused(other_bits):
    stored = other_bits.config["quantization_config"]
    stored["bits"], stored["levels"] = {3: (8, "linear"), 8: (3, "linear")}[stored["bits"]]
    with pytest.raises(ValueError, match="where the config says") as error:
        load(other_bits.write())
    assert_says(error, "weight is ", AGAIN)


def test_packed_rows_of_other_bits_are_no_dense_weight(other_bits, caplog):
    """64 columns of 8 bits are 64 bytes, and transformers casts integers to a parameter's dtype."""
    del other_bits.config["quantization_config"]
    refused_by_transformers(caplog, "pooler.dense.weight", other_bits.write())


@pytest.mark.parametrize("size", [0, 4, 100, -1], ids=["empty", "no-length", "half-a-header", "last-byte"])
def test_a_truncated_file_is_refused(size, stored):
    content = stored.file.read_bytes()
    stored.file.write_bytes(content[:size])
    with pytest.raises(ValueError, match=r"model\.safetensors: truncated or damaged"):
        load(stored.folder)


@pytest.mark.parametrize("width", [32, 64], ids=["narrow", "wide"])
def test_a_header_that_leaves_out_a_layer_does_not_change_what_is_loaded(width, tmp_path):
    """32 columns are 32 bytes when packed: the one width at which packed and dense shapes agree."""
    model = quantize_model(tiny.bert(hidden_size=width), CONFIG)
    model.save_pretrained(tmp_path)
    folder = Folder(tmp_path)
    known = json.loads(folder.metadata[METADATA_KEY])
    del known[LAYER]
    folder.metadata[METADATA_KEY] = json.dumps(known)
    assert tiny.different_tensors(load(folder.write()), model) == []


def test_scales_whose_product_is_infinite_are_named(stored):
    unit = stored.part("row_scale")
    unit[0] = 3e38
    with pytest.raises(ValueError, match="more than a float32 can hold") as error:
        load(stored.replace("row_scale", unit))
    assert_says(error, LAYER, AGAIN)


def test_levels_without_zero_for_code_zero_are_named(stored):
    levels = stored.part("levels")
    levels[8] = 3
    with pytest.raises(ValueError, match="levels has 3 for code zero, which must be 0") as error:
        load(stored.replace("levels", levels))
    assert_says(error, LAYER, AGAIN)


@pytest.mark.parametrize(
    ("key", "value", "part"),
    [
        ("levels", "linear", "levels"),
        ("column_scale", False, "column_scale"),
        ("scale_bits", 16, "row_scale"),
    ],
)
def test_a_part_that_the_config_does_not_know_is_named(key, value, part, stored):
    stored.config["quantization_config"][key] = value
    with pytest.raises(ValueError, match=f"knows no .*{part}|where the config says") as error:
        load(stored.write())
    assert_says(error, AGAIN)


# A quantized file: config.json.


@pytest.mark.parametrize("version", [6, 99, 0, -1, "1", None, True, 1.0], ids=repr)
def test_a_format_version_that_is_unknown_is_named(version, stored):
    stored.config["quantization_config"]["format_version"] = version
    with pytest.raises(ValueError, match=f"format_version={version!r}") as error:
        load(stored.write())
    if version in (6, 99):
        assert_says(error, "reads up to 5", "install a newer one")


@pytest.mark.parametrize(
    ("key", "value", "part"),
    [
        ("k", 16, "salient_values"),
        ("k", 33, "salient_values"),
        ("k", 0, "salient_values"),
        ("k", 0.5, "salient_values"),
        ("group_size", 64, "weight_scale"),
        ("scale_bits", 16, "weight_scale"),
        ("group_size", "row", "weight_scale"),
        ("group_size", "tensor", "weight_scale"),
        ("bits", 3, "weight"),
    ],
    ids=str,
)
def test_a_config_that_does_not_fit_the_tensors_is_refused(key, value, part, stored):
    stored.config["quantization_config"][key] = value
    with pytest.raises(ValueError, match="where the config says") as error:
        load(stored.write())
    assert_says(error, part, AGAIN)


def test_a_config_whose_scales_fit_in_shape_but_not_in_dtype_is_refused(tmp_path):
    """Scales of "row" are FP32, those of groups bfloat16: one rounding more, and nobody would know."""
    model = quantize_model(tiny.bert(intermediate_size=64), SVDQConfig(k=32, group_size="row", scale_bits=16))
    model.save_pretrained(tmp_path)
    folder = Folder(tmp_path)
    folder.config["quantization_config"]["group_size"] = 64
    with pytest.raises(ValueError, match=r"weight_scale is .*float32") as error:
        load(folder.write())
    assert_says(error, "torch.bfloat16", AGAIN)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("groupsize", 64, "did you mean 'group_size'?"),
        ("zero_point", True, "SVDQConfig knows no such key"),
        ("k", -1, "k=-1: must be an int from 0 on, or a float between 0 and 1"),
        ("k", "many", "k='many'"),
        ("k", None, "k=None"),
        ("group_size", 48, "group_size=48: must be a divisor of 64"),
        ("bits", 5, "bits=5: must be one of [3, 4, 8]"),
        ("rank", 0, "rank=0"),
        ("scale", "median", "scale='median': must be one of"),
        ("compute_dtype", "int8", "compute_dtype='int8'"),
        ("modules_to_not_convert", "pooler", "modules_to_not_convert='pooler': must be None or a list"),
    ],
    ids=str,
)
def test_a_wrong_entry_of_the_config_is_named(key, value, says, stored):
    stored.config["quantization_config"][key] = value
    with pytest.raises(ValueError, match=key) as error:
        load(stored.write())
    assert_says(error, says)


def test_a_dense_checkpoint_that_claims_to_be_quantized_is_refused(dense):
    dense.config["quantization_config"] = CONFIG.to_dict()
    with pytest.raises(ValueError, match="no layer of the files is quantized") as error:
        load(dense.write())
    assert_says(error, AGAIN)


def test_a_quantized_checkpoint_that_lost_its_config_is_refused(stored, caplog):
    del stored.config["quantization_config"]
    refused_by_transformers(caplog, "pooler.dense.weight", stored.write())


def test_a_quantized_checkpoint_that_lost_its_config_is_not_quantized_again(stored):
    del stored.config["quantization_config"]
    with pytest.raises(ValueError, match="could not quantize") as error:
        on_the_fly(stored.write())
    assert_says(error, "encoder.layer.0.", "quantized already")


# A dense checkpoint, quantized while it is loaded.


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_a_weight_that_is_no_number_is_named(value, dense):
    dense.part("weight")[5, 7] = value
    with pytest.raises(ValueError, match="a NaN or an infinity") as error:
        on_the_fly(dense.write())
    assert_says(error, LAYER, "the checkpoint is damaged")


def test_a_weight_that_is_no_number_is_named_in_a_conv1d(tmp_path):
    model = tiny.FAMILIES["gpt2"].build()
    model.transformer.h[1].mlp.c_proj.weight.data[0, 0] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a NaN or an infinity") as error:
        on_the_fly(tmp_path, model_class=hf.GPT2LMHeadModel)
    assert_says(error, "transformer.h.1.mlp.c_proj")


@pytest.fixture
def clip(tmp_path):
    """A model whose own initialisation reaches for the weights of its layers by name."""
    tiny.clip().save_pretrained(tmp_path)
    return Folder(tmp_path)


CLIP_LAYER = "text_model.encoder.layers.1.self_attn.q_proj"


def test_a_weight_that_is_no_number_is_named_in_clip(clip):
    clip.tensors[f"{CLIP_LAYER}.weight"][0, 0] = float("nan")
    with pytest.raises(ValueError, match="a NaN or an infinity") as error:
        on_the_fly(clip.write(), model_class=hf.CLIPModel)
    assert_says(error, CLIP_LAYER)


def test_a_weight_that_the_checkpoint_lacks_is_named_in_clip(clip):
    del clip.tensors[f"{CLIP_LAYER}.weight"]
    with pytest.raises(ValueError, match="the checkpoint has no weights for this layer") as error:
        on_the_fly(clip.write(), model_class=hf.CLIPModel)
    assert_says(error, CLIP_LAYER)


def test_a_new_head_of_a_model_that_is_its_own_base_stays_dense(clip):
    """CLIP's classes have no base model; their classifier is known by its name."""
    choices = {"model_class": hf.CLIPForImageClassification, "num_labels": 12}
    model = on_the_fly(clip.write(), **choices)
    assert type(model.classifier) is nn.Linear
    assert mark_trainable(model, show=False).counts["head"] == sum(
        p.numel() for p in model.classifier.parameters()
    )


def test_a_part_that_the_checkpoint_lacks_is_named_in_clip(tmp_path):
    quantize_model(tiny.clip(), CONFIG).save_pretrained(tmp_path)
    folder = Folder(tmp_path)
    del folder.tensors[f"{CLIP_LAYER}.weight"]
    with pytest.raises(ValueError, match="weight is missing") as error:
        hf.CLIPModel.from_pretrained(folder.write())
    assert_says(error, CLIP_LAYER, AGAIN)


@pytest.mark.parametrize(
    "shape", [(64, 32), (32, 64), (64, 65), (4096,), (1, 64, 64)], ids=lambda shape: "x".join(map(str, shape))
)
def test_a_dense_weight_of_wrong_shape_is_named(shape, dense):
    with pytest.raises(ValueError, match="could not quantize") as error:
        on_the_fly(dense.replace("weight", torch.zeros(shape)))
    assert_says(error, LAYER, f"the checkpoint's weight is {list(shape)}", "config says [64, 64]")


def test_a_conv1d_of_wrong_shape_is_named_as_the_checkpoint_has_it(tmp_path):
    tiny.FAMILIES["gpt2"].build().save_pretrained(tmp_path)
    folder = Folder(tmp_path)
    name = next(name for name in folder.tensors if name.endswith("h.1.mlp.c_fc.weight"))  # [in, out]
    folder.tensors[name] = folder.tensors[name].T.contiguous()
    with pytest.raises(ValueError, match="could not quantize") as error:
        on_the_fly(folder.write(), model_class=hf.GPT2LMHeadModel)
    assert_says(error, "transformer.h.1.mlp.c_fc", "weight is [96, 64]", "config says [64, 96]")


def test_a_bias_of_wrong_shape_is_named(dense, caplog):
    folder = dense.replace("bias", torch.zeros(63))
    refused_by_transformers(caplog, f"{LAYER}.bias", folder, quantization_config=CONFIG)


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn], ids=lambda d: str(d)[6:]
)
def test_a_dense_weight_that_is_no_plain_float_is_named(dtype, dense):
    with pytest.raises(ValueError, match=str(dtype)) as error:
        on_the_fly(dense.replace("weight", (100 * dense.part("weight")).to(dtype)))
    assert_says(error, LAYER, "torch.float32")


@pytest.mark.parametrize("name", ["pooler.dense", LAYER])
def test_a_layer_that_the_checkpoint_lacks_is_named(name, dense):
    del dense.tensors[f"{name}.weight"], dense.tensors[f"{name}.bias"]
    with pytest.raises(ValueError, match="the checkpoint has no weights for this layer") as error:
        on_the_fly(dense.write())
    assert_says(error, name, f"modules_to_not_convert=[{name!r}]")
    # and the remedy is one
    model = on_the_fly(dense.folder, SVDQConfig(k=32, modules_to_not_convert=[name]))
    assert type(model.get_submodule(name)) is nn.Linear


def test_a_checkpoint_of_another_head_names_the_pooler(tmp_path):
    hf.BertForMaskedLM(tiny.bert_config()).save_pretrained(tmp_path)  # it has no pooler
    with pytest.raises(ValueError, match="the checkpoint has no weights for this layer") as error:
        on_the_fly(tmp_path)
    assert_says(error, "pooler.dense", "modules_to_not_convert=['pooler.dense']")


@pytest.mark.parametrize("size", [0, 4, 100, -1], ids=["empty", "no-length", "half-a-header", "last-byte"])
def test_a_truncated_dense_file_is_refused(size, dense):
    dense.file.write_bytes(dense.file.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"model\.safetensors: truncated or damaged"):
        on_the_fly(dense.folder)


@pytest.fixture
def bad_score():
    """Makes a score known that does what it is told, for the length of a test."""

    def make(function):
        register_saliency("bad")(function)
        return SVDQConfig(k=32, saliency="bad")

    yield make
    saliency._SCORES.pop("bad", None)


BAD_SCORES = {
    "not-a-number": (lambda weight: weight * float("nan"), "a score is NaN"),
    "too-short": (lambda weight: weight[0], "returned (64,) for a weight (64, 64)"),
    "no-tensor": (lambda weight: None, "NoneType"),
    "value-error": (lambda weight: int("boom"), "boom"),
    "runtime-error": (lambda weight: weight @ torch.ones(3), "size mismatch"),
    "zero-division": (lambda weight: weight / (1 // 0), "zero"),
}


@pytest.mark.parametrize("kind", BAD_SCORES)
def test_a_users_score_that_fails_is_named_while_loading(kind, bad_score, dense):
    function, says = BAD_SCORES[kind]
    with pytest.raises(Exception, match=r"encoder\.layer\.0") as error:
        on_the_fly(dense.write(), bad_score(function))
    assert_says(error, says)


def test_a_score_that_nobody_registered_is_named(dense):
    with pytest.raises(ValueError, match="saliency='nobody'") as error:
        on_the_fly(dense.write(), {"quant_method": "svdq", "saliency": "nobody"})
    assert_says(error, "'svd'", "register_saliency")


# A model that cannot be quantized, or not again.


def test_a_model_without_linear_layers_is_refused_while_loading(tmp_path):
    config = hf.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1])
    hf.ResNetModel(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="ResNetModel has no linear layer to quantize"):
        on_the_fly(tmp_path, model_class=hf.ResNetModel)


def test_a_model_without_linear_layers_is_refused():
    with pytest.raises(ValueError, match=r"Sequential has no linear layer to quantize \(0 in all"):
        quantize_model(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()))


@pytest.mark.parametrize("pattern", ["*.dense", "encoder.layer[0", "(pooler"])
def test_a_pattern_that_is_no_regular_expression_is_named(pattern, dense):
    with pytest.raises(ValueError, match="modules_to_not_convert") as error:
        on_the_fly(dense.write(), SVDQConfig(k=32, modules_to_not_convert=[pattern]))
    assert_says(error, repr(pattern))


def test_a_wrong_key_of_a_plain_dict_is_named_in_memory():
    assert len(list(svdq_layers(quantize_model(tiny.bert(), {"k": 32})))) == 13
    with pytest.raises(ValueError, match="SVDQConfig knows no such key"):
        quantize_model(tiny.bert(), {"kk": 32})


def test_when_all_layers_are_kept_dense_it_is_said_by_what(dense):
    with pytest.raises(ValueError, match=r"no linear layer to quantize \(13 in all") as error:
        on_the_fly(dense.write(), SVDQConfig(k=32, modules_to_not_convert=["encoder", "pooler"]))
    assert_says(error, "'encoder'", "'pooler'")


def test_layers_of_a_kind_that_is_not_quantized_are_named():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    with pytest.raises(ValueError, match="no linear layer to quantize") as error:
        quantize_model(nn.Sequential(Doubled(64, 64)), CONFIG)
    assert_says(error, "Doubled")


def test_a_single_layer_is_refused_with_a_remedy():
    with pytest.raises(ValueError, match="Linear") as error:
        quantize_model(nn.Linear(64, 64))
    assert_says(error, "nn.Sequential")


def test_a_quantized_model_is_not_quantized_again(stored):
    model = load(stored.folder)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ValueError, match="the model is quantized already") as error:
        quantize_model(model)
    assert_says(error, "svdq")
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_a_model_quantized_by_others_is_not_quantized_again():
    model = tiny.bert()
    model.quantization_method = "hqq"  # as transformers marks it
    with pytest.raises(ValueError, match="quantized already, by hqq"):
        quantize_model(model)


def test_any_quantized_module_is_not_quantized_again_and_the_remedy_is_one():
    model = quantize_model(nn.Sequential(nn.Linear(64, 64)), CONFIG)
    with pytest.raises(ValueError, match="quantized already") as error:
        quantize_model(model)
    assert_says(error, "dequantize_model")
    assert type(quantize_model(dequantize_model(model), CONFIG)[0]) is SVDQLinear


def test_a_weight_that_is_no_number_is_named_in_memory():
    model = tiny.bert()
    model.get_submodule(LAYER).weight.data[0, 0] = float("inf")
    with pytest.raises(ValueError, match="a NaN or an infinity") as error:
        quantize_model(model, CONFIG)
    assert_says(error, LAYER)


def test_a_model_left_half_quantized_can_be_repaired_and_quantized():
    model = tiny.bert()
    weight = model.get_submodule(LAYER).weight
    weight.data[0, 0] = float("inf")
    with pytest.raises(ValueError, match="a NaN or an infinity"):
        quantize_model(model, CONFIG)
    dequantize_model(model)
    model.get_submodule(LAYER).weight.data[0, 0] = 0
    assert len(list(svdq_layers(quantize_model(model, CONFIG)))) == 13


def test_a_model_without_data_is_refused():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(64, 64))
    with pytest.raises(ValueError, match="meta") as error:
        quantize_model(model, CONFIG)
    assert_says(error, "0:")


def test_dequantizing_what_is_not_quantized_changes_nothing():
    model = nn.Sequential(nn.Linear(64, 64))
    layer = model[0]
    assert dequantize_model(model)[0] is layer


def test_dequantizing_a_model_that_is_partly_on_disk_is_refused(stored, tmp_path):
    places = {"embeddings": "cpu", "encoder.layer.0": "cpu", "encoder.layer.1": "disk", "pooler": "cpu"}
    model = load(stored.folder, device_map=places, offload_folder=tmp_path / "offload")
    with pytest.raises(ValueError, match="disk") as error:
        model.dequantize()
    assert_says(error, "encoder.layer.1.")


# Hostile, rather than damaged.


@pytest.mark.parametrize("pattern", ["(\\w+\\W?)+!", "(", ".*"], ids=["slow", "broken", "everything"])
def test_names_of_a_stored_config_decide_nothing(pattern, stored, quantized_folder):
    stored.config["quantization_config"]["modules_to_not_convert"] = [pattern]
    assert tiny.different_tensors(load(stored.write()), load(quantized_folder)) == []


@pytest.mark.parametrize(
    "facts",
    ["[" * 100_000, json.dumps({LAYER: {"relative_error": True}}), f'{{"{LAYER}": {{"a": 1{"0" * 400}}}}}'],
    ids=["deep", "bool", "long"],
)
def test_facts_that_are_no_numbers_are_no_facts(facts, stored):
    stored.metadata[METADATA_KEY] = facts
    assert load(stored.write()).get_submodule(LAYER).facts == {}


def test_a_score_that_works_in_place_is_refused(bad_score):
    model = nn.Sequential(nn.Linear(64, 64))
    with pytest.raises(ValueError, match="changed the weight in place"):
        quantize_model(model, bad_score(lambda weight: weight.abs_()))


def test_a_weight_that_is_no_number_stops_before_anything_is_converted():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model[1].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="could not quantize 1: weight has a NaN"):
        quantize_model(model, CONFIG)
    assert [type(layer) for layer in model] == [nn.Linear, nn.Linear]
