"""What comes along from a model's folder, and what does not."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import bert, bert_config
from transformers import BertModel

from svdq_hf import SVDQConfig, read_footprint
from svdq_hf.checkpoint.companion_files import copy_companions
from svdq_hf.checkpoint.export import export_dense
from svdq_hf.checkpoint.quantize import quantize_checkpoint
from svdq_hf.cli.command import main
from svdq_hf.format.files import folder_bytes

CONFIG = SVDQConfig(k=4)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    bert().save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def names(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if not file.is_dir()}


@pytest.mark.parametrize(
    "name", ["source.spm", "bpe.codes", "prophetnet.tokenizer", "qwen.tiktoken", "2_Dense/config.json"]
)
def test_files_of_tokenizers_come_along(name, source, tmp_path):
    (source / name).parent.mkdir(exist_ok=True)
    (source / name).write_text("{}")
    if "/" in name:  # a part of a sentence-transformers model, with weights
        save_file({"linear.weight": torch.ones(2, 2)}, source / "2_Dense" / "model.safetensors")
    quantize_checkpoint(source, tmp_path / "out", CONFIG)
    assert (tmp_path / "out" / name).read_text() == "{}"
    export_dense(tmp_path / "out", tmp_path / "dense-again")
    assert (tmp_path / "dense-again" / name).read_text() == "{}"


def test_quantized_models_in_subfolders_stay_where_they_are(source):
    quantize_checkpoint(source, source / "q4", CONFIG)
    quantize_checkpoint(source, source / "q3", CONFIG)
    assert names(source / "q3") == names(source / "q4")
    assert not any("q4" in name for name in names(source / "q3"))


def test_links_to_outside_are_not_followed_and_named(source, tmp_path, caplog):
    (tmp_path / "private.txt").write_text("secret")
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "keys.json").write_text("{}")
    (source / "vocab.txt").write_text("[PAD]")
    os.symlink(tmp_path / "private.txt", source / "notes.txt")
    os.symlink(tmp_path / "more", source / "more")
    os.symlink("vocab.txt", source / "vocabulary.txt")
    os.symlink("..", source / "loop")
    (tmp_path / "out").mkdir()
    copy_companions(source, tmp_path / "out")
    assert names(tmp_path / "out") == {"config.json", "vocab.txt", "vocabulary.txt"}
    assert [one.getMessage() for one in caplog.records] == [
        f"{source}: notes.txt is a link to outside of that folder, and not copied"
    ]


def test_links_into_the_cache_of_the_hub_are_files(source, tmp_path):
    blobs, snapshot = tmp_path / "cache" / "blobs", tmp_path / "cache" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    (snapshot / "1_Pooling").mkdir(parents=True)
    for at, name in enumerate(["vocab.txt", "1_Pooling/config.json"]):
        (blobs / str(at)).write_text("{}")
        os.symlink(os.path.relpath(blobs / str(at), (snapshot / name).parent), snapshot / name)
    (tmp_path / "out").mkdir()
    copy_companions(snapshot, tmp_path / "out")
    assert names(tmp_path / "out") == {"vocab.txt", "1_Pooling/config.json"}


@pytest.mark.parametrize("whole", [True, False], ids=["beside a model", "alone"])
def test_adapter_is_told_to_be_merged(whole, source, tmp_path, capsys):
    if not whole:
        shutil.rmtree(source)
        source.mkdir()
    (source / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    for command in ("quantize", "export"):
        assert main([command, str(source), str(tmp_path / "out")]) == 1
        assert "holds a LoRA adapter (adapter_config.json); merge it (merge_and" in capsys.readouterr().err
    assert main(["quantize", str(source), str(tmp_path / "out"), "--dry-run"]) == 1
    assert "holds a LoRA adapter" in capsys.readouterr().err


def test_sizes_are_those_of_the_files_that_are_read(tmp_path, capsys):
    BertModel(bert_config()).save_pretrained(tmp_path / "dense", max_shard_size="100KB")
    size = sum(file.stat().st_size for file in (tmp_path / "dense").glob("model-*.safetensors"))
    save_file({"layers.0.weight": torch.ones(500, 500)}, tmp_path / "dense" / "consolidated.safetensors")
    assert folder_bytes(tmp_path / "dense") == size
    out = tmp_path / "out"
    assert main(["quantize", str(tmp_path / "dense"), str(out), "--k", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bytes_before"] == size
    before = read_footprint(out)
    shutil.copy(tmp_path / "dense" / "consolidated.safetensors", out)
    assert read_footprint(out) == before


def test_file_that_the_index_names_and_is_not_there(tmp_path, capsys):
    bert().save_pretrained(tmp_path / "dense")
    quantize_checkpoint(tmp_path / "dense", tmp_path / "out", CONFIG, shard_size="20KB")
    gone = sorted((tmp_path / "out").glob("*.safetensors"))[1]
    gone.unlink()
    assert main(["inspect", str(tmp_path / "out")]) == 1
    told = capsys.readouterr().err
    assert f"{tmp_path / 'out'}: {gone.name} is missing, " in told
    assert "tensors are in it; download or copy the model again" in told


@pytest.mark.parametrize("command", [["inspect"], ["push", "me/model"]], ids=["inspect", "push"])
def test_what_is_no_folder_is_told(command, source, capsys):
    file = str(source / "model.safetensors")
    assert main([command[0], file, *command[1:]]) == 1
    assert f"{file}: is a file; name the folder of a model" in capsys.readouterr().err
    assert main([command[0], str(source / "nothing"), *command[1:]]) == 1
    assert f"{source / 'nothing'}: no such folder" in capsys.readouterr().err
