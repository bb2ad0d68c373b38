"""A checkpoint that is not what it should be, a machine that is too small: told before anything is made."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import letters
import pytest
import torch
from safetensors.torch import load_file, save_file
from streamed import edit_tensors
from tiny_models import classifier, dinov2, llama

import svdq_hf.checkpoint.source
import svdq_hf.checkpoint.streaming.resume
import svdq_hf.quantize.input_statistics
from svdq_hf import SVDQConfig, quantize_model
from svdq_hf.calibration.synthetic import synthetic_batches
from svdq_hf.checkpoint.estimate import estimate_checkpoint
from svdq_hf.checkpoint.folders import parse_size
from svdq_hf.checkpoint.quantize import quantize_checkpoint
from svdq_hf.cli.command import main

CONFIG = SVDQConfig(k=4)
FIRST, SECOND = (f"model-0000{number}-of-00003.safetensors" for number in (1, 2))
INDEX = "model.safetensors.index.json"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    llama().save_pretrained(tmp_path / "dense", max_shard_size="100KB")
    return tmp_path / "dense"


def change(file: Path, how: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(file)
    how(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def missing(folder: Path) -> None:
    (folder / SECOND).unlink()


def truncated(folder: Path) -> None:
    (folder / SECOND).write_bytes((folder / SECOND).read_bytes()[:-7])


def nothing_of_a_header(folder: Path) -> None:
    (folder / SECOND).write_bytes(b"abc")


def header_that_lies(folder: Path) -> None:
    data = (folder / SECOND).read_bytes()
    (folder / SECOND).write_bytes((2**40).to_bytes(8, "little") + data[8:])


def doubled(folder: Path) -> None:
    other = load_file(folder / SECOND)
    name = sorted(other)[0]
    change(folder / FIRST, lambda tensors: tensors.update({name: other[name]}))


def gone_from_its_file(folder: Path) -> None:
    change(folder / FIRST, lambda tensors: tensors.pop("model.embed_tokens.weight"))


def unknown_to_the_index(folder: Path) -> None:
    change(folder / FIRST, lambda tensors: tensors.update(stray=torch.ones(2)))


def write_index(folder: Path, text: str) -> None:
    (folder / INDEX).write_text(text)


def no_index(folder: Path) -> None:
    (folder / INDEX).unlink()


def half_an_index(folder: Path) -> None:
    write_index(folder, (folder / INDEX).read_text()[:99])


def index_of_something_else(folder: Path) -> None:
    write_index(folder, '{"weight_map": ["a"]}')


def index_that_points_elsewhere(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = "../other.safetensors"
    write_index(folder, json.dumps(index))


def fp8(folder: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    file = folder / json.loads((folder / INDEX).read_text())["weight_map"][name]
    change(file, lambda tensors: tensors.update({name: tensors[name].to(torch.float8_e4m3fn)}))


def gguf(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        file.unlink()
    (folder / "model-q4.gguf").write_bytes(b"GGUF")


def other_method(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))


def ours_without_its_config(folder: Path) -> None:
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    quantize_model(llama(), CONFIG).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))


BAD = {
    missing: f"{SECOND} is missing, .* tensors are in it; download or copy the model again",
    truncated: f"{SECOND}: truncated or damaged",
    nothing_of_a_header: f"{SECOND}: truncated or damaged",
    header_that_lies: f"{SECOND}: truncated or damaged",
    doubled: f"is in two files, {FIRST} and {SECOND}: which one is meant",
    gone_from_its_file: f"{INDEX} has model.embed_tokens.weight in {FIRST}, and it is in none",
    unknown_to_the_index: f"{INDEX} has stray in no file, and it is in {FIRST}",
    no_index: f"neither model.safetensors nor {INDEX} is there, but {FIRST}",
    half_an_index: "not an index of safetensors files",
    index_of_something_else: "not an index of safetensors files",
    index_that_points_elsewhere: "names '../other.safetensors', which is no safetensors file beside it",
    fp8: "could not quantize model.layers.0.self_attn.q_proj: weight is torch.float8_e4m3fn",
    gguf: "no .*safetensors file is there; GGUF files are not read",
    other_method: "quantized already, by 'gptq'",
    ours_without_its_config: "quantized already, by svdq, and config.json has lost",
}


@pytest.mark.parametrize("spoil", BAD, ids=lambda spoil: spoil.__name__)
def test_bad_input_is_refused_and_nothing_is_written_or_changed(spoil, source, tmp_path):
    spoil(source)
    before = {file: file.read_bytes() for file in source.iterdir()}
    with pytest.raises(ValueError, match=BAD[spoil]):
        quantize_checkpoint(source, tmp_path / "out", CONFIG)
    assert {file: file.read_bytes() for file in source.iterdir()} == before
    assert {file.name for file in tmp_path.iterdir()} == {"dense"}


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("model.bin", "is a file; name the folder of a model"),
        ("model.gguf", "is a GGUF file, .*: svdq gguf F16"),
    ],
)
def test_a_file_is_no_model(name, told, tmp_path):
    (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=rf"{name}: {told}"):
        quantize_checkpoint(tmp_path / name, tmp_path / "out", CONFIG)


def test_file_that_becomes_shorter_while_it_is_read(source, tmp_path, monkeypatch):
    real = svdq_hf.checkpoint.streaming.resume.make_shards

    def shorten(*arguments: object) -> None:
        truncated(source)
        real(*arguments)

    monkeypatch.setattr(svdq_hf.checkpoint.streaming.resume, "make_shards", shorten)
    with pytest.raises(OSError, match=f"{SECOND}: ends within"):
        quantize_checkpoint(source, tmp_path / "out", CONFIG)
    assert (tmp_path / ".out.unfinished").exists()  # what is done stays


@pytest.mark.parametrize("build", [llama, dinov2], ids=["streamed", "in memory"])
def test_disk_that_is_too_small_is_told_before_the_work_starts(build, tmp_path, monkeypatch):
    class Usage:
        free = 1000

    build().save_pretrained(tmp_path / "dense")
    monkeypatch.setattr(svdq_hf.checkpoint.streaming.resume.shutil, "disk_usage", lambda folder: Usage)
    with pytest.raises(ValueError, match=r"needs 0\.\d MB of disk, and 0\.0 MB are free"):
        quantize_checkpoint(tmp_path / "dense", tmp_path / "deep" / "out", CONFIG)
    assert {file.name for file in tmp_path.iterdir()} == {"dense"}


@pytest.mark.parametrize("size", ["", "5", "GB", "-1GB", "0MB", "1 PB", "ten MB"])
def test_shard_size_that_is_none(size):
    with pytest.raises(ValueError, match="must be a number and KB, MB, GB or TB"):
        parse_size(size)


def test_workers_are_counted_from_one(source, tmp_path, capsys):
    assert main(["quantize", str(source), str(tmp_path / "out"), "--workers", "0"]) == 1
    assert "workers=0: must be 1 or more" in capsys.readouterr().err


# What a run will take.


def test_dry_run_tells_the_sizes_that_a_run_has_and_writes_nothing(source, tmp_path, capsys):
    command = ["quantize", str(source), str(tmp_path / "out"), "--k", "4", "--json"]
    assert main([*command, "--dry-run"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {file.name for file in tmp_path.iterdir()} == {"dense"}
    assert main(command) == 0
    done = json.loads(capsys.readouterr().out)
    assert told["totals"] == done["totals"]
    assert told["bytes_before"] == done["bytes_before"]
    assert told["bytes_after"] == done["totals"]["total_bytes"]
    sizes = ("shape", "k", "bits_per_weight")
    for name, layer in done["layers"].items():
        assert told["layers"][name] == {key: layer[key] for key in sizes}
    # what is written, and room for the file that gets its header
    assert 2 * told["bytes_after"] <= told["disk_bytes"] <= 3 * done["bytes_after"]
    assert told["in_memory"] is None


def test_time_is_that_of_a_sample_times_the_weights(source, tmp_path, monkeypatch):
    monkeypatch.setattr("svdq_hf.checkpoint.estimate._seconds", lambda unit, config: unit.input_size / 4e6)
    result = estimate_checkpoint(source, tmp_path / "out", CONFIG)
    assert result.seconds == pytest.approx(result.footprint.weights / 1e6)
    assert len(result.sampled) == 4
    halved = estimate_checkpoint(source, tmp_path / "out", CONFIG, workers=2)
    assert halved.seconds == pytest.approx(result.seconds / 2)
    assert halved.memory_bytes > 1.5 * result.memory_bytes > 1e8


def test_dry_run_is_a_table_for_people(source, tmp_path, capsys):
    assert main(["quantize", str(source), str(tmp_path / "out"), "--dry-run"]) == 0
    told = capsys.readouterr().out
    for word in (
        "model.layers.1.mlp.down_proj",
        "bits",
        "out x in",
        "before",
        "time, about",
        "memory, about",
        "disk",
    ):
        assert word in told
    assert "nothing was written" in told


def test_dry_run_says_why_a_model_is_not_streamed(tmp_path, capsys):
    dinov2().save_pretrained(tmp_path / "dense")
    assert main(["quantize", str(tmp_path / "dense"), str(tmp_path / "out"), "--dry-run"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "the whole model is quantized in memory: its files join or cut tensors" in told
    assert "encoder.layer.1.attention.o_proj" in told


@pytest.mark.parametrize("command", [["--preset", "self-calibrated"], ["--preset", "calibrated"]])
def test_dry_run_of_a_model_that_is_run_first_tells_its_sizes(command, source, tmp_path, monkeypatch, capsys):
    few = partial(synthetic_batches, tokens=400)
    monkeypatch.setattr(svdq_hf.quantize.input_statistics, "synthetic_batches", few)
    (tmp_path / "text").write_text("A text that is read. " * 99)
    letters.tokenizer().save_pretrained(source)
    if command[1] == "calibrated":
        command = [*command, "--calibration", str(tmp_path / "text"), "--samples", "1", "--length", "16"]
    command = ["quantize", str(source), str(tmp_path / "out"), "--json", *command]
    assert main([*command, "--dry-run"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert main(command) == 0
    made = json.loads(capsys.readouterr().out)
    assert told["totals"] == pytest.approx(made["totals"], rel=1e-3)
    assert told["seconds"] is None


@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["run", "dry run"])
def test_a_model_that_writes_nothing_is_not_calibrated_on_its_own_text(dry, tmp_path, capsys):
    dinov2().save_pretrained(tmp_path / "dense")
    command = ["quantize", str(tmp_path / "dense"), str(tmp_path / "out"), "--preset", "self_calibrated"]
    assert main([*command, *dry]) == 1
    assert "only a causal model with its head has" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["run", "dry run"])
def test_out_folder_that_is_not_empty_is_refused(dry, source, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    assert main(["quantize", str(source), str(tmp_path / "out"), *dry]) == 1
    assert "is there already and not empty" in capsys.readouterr().err


def test_a_bias_that_is_no_number_is_named_before_anything_is_written(tmp_path):
    classifier().save_pretrained(tmp_path / "dense")
    name = "bert.encoder.layer.0.attention.self.query.bias"
    edit_tensors(tmp_path / "dense", lambda tensors: tensors[name].fill_(torch.nan))
    with pytest.raises(ValueError, match=r"attention\.self\.query: .*bias has a NaN or an infinity"):
        quantize_checkpoint(tmp_path / "dense", tmp_path / "out", SVDQConfig(k=4))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("workers", [0, -1])
@pytest.mark.parametrize("extra", [[], ["--dry-run"]], ids=["run", "dry run"])
def test_a_number_of_workers_that_is_none_is_named(workers, extra, tmp_path, capsys):
    classifier().save_pretrained(tmp_path / "dense")
    asked = ["quantize", str(tmp_path / "dense"), str(tmp_path / "out"), "--workers", str(workers)]
    assert main([*asked, *extra]) == 1
    assert f"workers={workers}: must be 1 or more" in capsys.readouterr().err


def test_what_is_found_wrong_at_the_end_does_not_stay(tmp_path, monkeypatch):
    classifier().save_pretrained(tmp_path / "dense")

    def lost(source, work):
        raise ValueError("a tensor is lost")

    monkeypatch.setattr(svdq_hf.checkpoint.source.Source, "check_written", lost)
    with pytest.raises(ValueError, match="a tensor is lost"):
        quantize_checkpoint(tmp_path / "dense", tmp_path / "out", SVDQConfig(k=4))
    assert [one.name for one in tmp_path.iterdir()] == ["dense"]
