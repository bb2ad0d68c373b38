import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import bert, classifier, different_tensors, dinov2, llama, mixtral, outputs, text, tokens
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

from svdq_hf import SVDQConfig, quantize_model
from svdq_hf.checkpoint.export import export_dense
from svdq_hf.cli.command import main
from svdq_hf.hub.readme import metadata_of

FILES = {"tokenizer.json": "{}", "prompts/system.txt": "Be kind.", "svdq_report.json": "{}"}
CARD = "---\nlicense: mit\nbase_model: org/base\nbase_model_relation: quantized\ntags:\n- 4-bit\n---\nMine.\n"


def quantized_folder(model: PreTrainedModel, folder: Path, **choices: object) -> Path:
    quantize_model(model, SVDQConfig(**{"k": 8, **choices})).save_pretrained(folder)
    for name, content in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)
    (folder / "README.md").write_text(CARD)
    return folder


@pytest.fixture
def source(tmp_path) -> Path:
    return quantized_folder(llama(), tmp_path / "quantized")


def test_exported_model_is_the_dequantized_one_and_plain(source, tmp_path):
    size = export_dense(source, tmp_path / "out", "float32")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    expected = AutoModelForCausalLM.from_pretrained(source).dequantize()
    assert different_tensors(exported, expected) == []
    assert exported.state_dict().keys() == llama().state_dict().keys()
    assert size == (tmp_path / "out" / "model.safetensors").stat().st_size
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "float32"
    assert not list(tmp_path.glob(".out.*"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_tensor_has_the_dtype(dtype, source, tmp_path):
    export_dense(source, tmp_path / "out", dtype)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {getattr(torch, dtype)}
    name = "model.layers.0.mlp.up_proj.weight"
    dense = AutoModelForCausalLM.from_pretrained(source).dequantize().state_dict()[name]
    assert torch.equal(stored[name], dense.to(getattr(torch, dtype)))


def test_companions_come_along_and_the_report_stays(source, tmp_path):
    (tmp_path / "out").mkdir()  # an empty folder is as good as none
    export_dense(source, tmp_path / "out")
    files = {str(file.relative_to(tmp_path / "out")) for file in (tmp_path / "out").rglob("*")}
    assert {"tokenizer.json", "prompts/system.txt", "generation_config.json"} <= files
    assert "svdq_report.json" not in files
    card = (tmp_path / "out" / "README.md").read_text()
    assert metadata_of(card) == {
        "library_name": "transformers",
        "base_model": "org/base",
        "base_model_relation": "quantized",
        "license": "mit",
    }
    assert "bfloat16 weights, dequantized by svdq_hf" in card
    assert "what quantizing lost is not back" in card


@pytest.mark.parametrize("build", [bert, classifier, mixtral, dinov2])
def test_families_are_written_as_their_own_files_are(build, tmp_path):
    source = quantized_folder(build(), tmp_path / "quantized")
    export_dense(source, tmp_path / "out", "float32")
    build().save_pretrained(tmp_path / "dense")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "dense"))
    assert {name: one.shape for name, one in ours.items()} == {
        name: one.shape for name, one in theirs.items()
    }


def test_quantized_head_is_dense_again(tmp_path):
    source = quantized_folder(llama(tie_word_embeddings=True), tmp_path / "quantized", lm_head=True)
    export_dense(source, tmp_path / "out", "float32")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    quantized = AutoModelForCausalLM.from_pretrained(source)
    # the same weights, multiplied in another order
    torch.testing.assert_close(outputs(exported, text()), outputs(quantized, text()), rtol=1e-4, atol=1e-5)
    assert exported.get_output_embeddings().weight is exported.get_input_embeddings().weight


def test_command_line(source, tmp_path, capsys):
    assert main(["export", str(source), str(tmp_path / "out"), "--to", "dense", "--dtype", "float16"]) == 0
    assert "dense, float16" in capsys.readouterr().out
    assert main(["export", str(source), str(tmp_path / "json"), "--json"]) == 0
    written = json.loads(capsys.readouterr().out)
    assert written["bytes"] == (tmp_path / "json" / "model.safetensors").stat().st_size
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.float16
    assert model(tokens()).logits.isfinite().all()


def test_dense_folder_is_refused(tmp_path, capsys):
    bert().save_pretrained(tmp_path / "dense")
    assert main(["export", str(tmp_path / "dense"), str(tmp_path / "out")]) == 1
    assert "not quantized: it is dense already; export takes what" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_folder_of_another_method_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    with pytest.raises(ValueError, match="quantized by 'gptq', not by svdq"):
        export_dense(tmp_path, tmp_path / "out")


def test_output_that_is_not_empty_is_refused_and_kept(source, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        export_dense(source, tmp_path / "out")
    with pytest.raises(ValueError, match="not empty"):
        export_dense(source, source)  # in place: nothing is lost
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"
    assert AutoModel.from_pretrained(source) is not None


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no config\.json is there"):
        export_dense(tmp_path, tmp_path / "out")
    with pytest.raises(ValueError, match=r"\./nowhere: no such folder"):
        export_dense("./nowhere", tmp_path / "out")
    with pytest.raises(ValueError, match=r"dtype='int8': must be one of"):
        export_dense(tmp_path, tmp_path / "out", "int8")


@pytest.mark.parametrize("wrong", [["--to", "gguf"], ["--dtype", "int8"], []])
def test_wrong_usage_names_what_is_allowed(wrong, source, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["export", str(source), *(["out", *wrong] if wrong else [])])
    assert "usage: svdq export" in capsys.readouterr().err


def test_weight_that_float16_cannot_hold_is_told(source, tmp_path):
    file = source / "model.safetensors"
    stored = load_file(file)
    stored["model.layers.1.mlp.up_proj.salient_values"][0] = 1e6
    save_file(stored, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight has weights that float16 cannot"):
        export_dense(source, tmp_path / "out", "float16")
    assert not (tmp_path / "out").exists()
    assert export_dense(source, tmp_path / "out", "bfloat16") > 0


def test_missing_tensor_is_told_by_layer(source, tmp_path):
    file = source / "model.safetensors"
    stored = load_file(file)
    del stored["model.layers.1.mlp.up_proj.weight_scale"]
    save_file(stored, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"up_proj: weight_scale is missing"):
        export_dense(source, tmp_path / "out")
