"""What comes along from a model's folder, and what does not."""

import json
import os
import shutil
import subprocess
import sys
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
    if "/" in name:  # a folder that no modules.json names, with weights
        save_file({"linear.weight": torch.ones(2, 2)}, source / "2_Dense" / "model.safetensors")
    quantize_checkpoint(source, tmp_path / "out", CONFIG)
    assert (tmp_path / "out" / name).read_text() == "{}"
    export_dense(tmp_path / "out", tmp_path / "dense-again")
    assert (tmp_path / "dense-again" / name).read_text() == "{}"


def modules(folder: Path, **kinds: str) -> None:
    """A folder becomes a sentence-transformers model of these modules after the transformer."""
    entries = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]
    for number, (name, kind) in enumerate(kinds.items(), 1):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text("{}")
        entries.append({"idx": number, "name": str(number), "path": name, "type": f"somewhere.{kind}"})
    (folder / "modules.json").write_text(json.dumps(entries))


@pytest.mark.parametrize("kind", ["Dense", "MyOwn"])
def test_modules_are_carried_over_whole_whatever_they_hold(kind, source, tmp_path):
    modules(source, pooling="Pooling", dense=kind)
    save_file({"linear.weight": torch.ones(2, 2)}, source / "dense" / "model.safetensors")
    for name in ("code.py", "deep/table.npy", "model.safetensors.index.json", "pytorch_model.bin"):
        (source / "dense" / name).parent.mkdir(exist_ok=True)
        (source / "dense" / name).write_bytes(name.encode())
    whole = {name for name in names(source / "dense") if not name.endswith(".bin")}
    quantize_checkpoint(source, tmp_path / "out", CONFIG)
    export_dense(tmp_path / "out", tmp_path / "again")
    for folder in (tmp_path / "out", tmp_path / "again"):
        assert names(folder / "dense") == whole  # the same weights in a pickle stay behind
        for name in whole:
            assert (folder / "dense" / name).read_bytes() == (source / "dense" / name).read_bytes()


def pickled(folder: Path) -> None:
    (folder / "dense" / "pytorch_model.bin").write_bytes(b"pickle")


def linked_away(folder: Path) -> None:
    (folder.parent / "secret.safetensors").write_bytes(b"x")
    (folder / "dense" / "model.safetensors").symlink_to(folder.parent / "secret.safetensors")


def elsewhere(folder: Path) -> None:
    entry = {"path": "../other", "type": "sentence_transformers.models.Dense"}
    (folder / "modules.json").write_text(json.dumps([entry]))


def damaged(folder: Path) -> None:
    (folder / "modules.json").write_text("[{]")


BAD_MODULES = {
    pickled: r"dense \(Dense\) has no safetensors file: dense/pytorch_model\.bin is a pickle",
    lambda folder: None: r"the module dense \(Dense\) has no safetensors file: it has none here; load",
    linked_away: r"dense/model\.safetensors is a link to outside of that folder",
    elsewhere: r"modules\.json: names '\.\./other', which is no folder beside it",
    damaged: r"modules\.json: damaged",
}


@pytest.mark.parametrize("spoil", BAD_MODULES, ids=["pickle", "nothing", "link", "elsewhere", "damaged"])
def test_a_module_that_cannot_be_carried_over_is_refused_before_the_work(
    spoil, source, tmp_path, monkeypatch
):
    quantize_checkpoint(source, tmp_path / "quantized", CONFIG)
    monkeypatch.setattr("svdq_hf.checkpoint.quantize.make_plan", None)
    monkeypatch.setattr("svdq_hf.checkpoint.export.load_complete", None)
    for folder, write in ((source, quantize_checkpoint), (tmp_path / "quantized", export_dense)):
        modules(folder, dense="Dense")
        spoil(folder)
        with pytest.raises(ValueError, match=BAD_MODULES[spoil]):
            write(folder, tmp_path / "out", *([CONFIG] if write is quantize_checkpoint else []))
        shutil.rmtree(folder / "dense")
        (tmp_path / "secret.safetensors").unlink(missing_ok=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_sentence_model_with_a_dense_module_loads_and_answers_alike(source, tmp_path):
    script = f"""
import warnings; warnings.simplefilter("ignore")
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.models import Dense, Pooling, Transformer
from svdq_hf import SVDQConfig
from svdq_hf.checkpoint import export_dense, quantize_checkpoint
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast
words = Tokenizer(WordLevel({{"[PAD]": 0, "[UNK]": 1, "a": 2}}, unk_token="[UNK]"))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")
tokenizer.save_pretrained({str(source)!r})
transformer = Transformer({str(source)!r})
model = SentenceTransformer(modules=[transformer, Pooling(64), Dense(64, 8)], device="cpu")
model.save({str(tmp_path / "st")!r})
quantize_checkpoint({str(tmp_path / "st")!r}, {str(tmp_path / "q")!r}, SVDQConfig(bits=8))
export_dense({str(tmp_path / "q")!r}, {str(tmp_path / "again")!r}, "float32")
first = model.encode(["a"], convert_to_tensor=True)
for folder in ({str(tmp_path / "q")!r}, {str(tmp_path / "again")!r}):
    second = SentenceTransformer(folder, device="cpu").encode(["a"], convert_to_tensor=True)
    assert torch.nn.functional.cosine_similarity(first, second).item() > 0.999, folder
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


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
