import errno
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import bert_config
from transformers import BertForMaskedLM, BertModel

from svdq_hf import SVDQConfig, read_footprint
from svdq_hf.checkpoint.export import export_dense
from svdq_hf.checkpoint.quantize import quantize_checkpoint
from svdq_hf.format.files import REPORT_FILE, folder_bytes, full_disk_named
from svdq_hf.format.metadata import tags
from svdq_hf.hub.client import local_folder
from svdq_hf.hub.readme import metadata_of, own_text

CONFIG = SVDQConfig(k=16)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "dense"
    BertForMaskedLM(bert_config()).save_pretrained(folder)
    (folder / "vocab.txt").write_text("[PAD]\n")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    (folder / "modeling_evil.py").write_text("raise SystemExit")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    return folder


def test_folder_holds_model_report_and_companions(source, tmp_path):
    out = tmp_path / "deep" / "out"
    result = quantize_checkpoint(source, out, CONFIG)
    assert {str(file.relative_to(out)) for file in out.rglob("*") if file.is_file()} == {
        "config.json",
        "model.safetensors",
        "vocab.txt",
        "1_Pooling/config.json",
        "README.md",
        REPORT_FILE,
    }
    sizes = {"bytes_before": folder_bytes(source), "bytes_after": folder_bytes(out)}
    assert json.loads((out / REPORT_FILE).read_text()) == {**sizes, **result.to_dict()}
    assert read_footprint(out) == result


def test_card_says_what_the_card_of_the_base_says_and_names_no_local_path(source, tmp_path):
    (source / "README.md").write_bytes(b"---\nlicense: mit\nbase_model: org/base\n---\nAbout it \xff.")
    quantize_checkpoint(source, tmp_path / "out", CONFIG)
    card = (tmp_path / "out" / "README.md").read_text()
    metadata = {
        "license": "mit",
        "base_model": "org/base",
        "library_name": "transformers",
        "tags": tags(),
    }
    assert metadata_of(card) == metadata
    assert own_text(card) == ""
    assert str(tmp_path) not in card


def test_the_class_that_config_json_names_is_the_one_that_is_saved(source, tmp_path):
    quantize_checkpoint(source, tmp_path / "out", CONFIG)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["BertForMaskedLM"]


def test_folder_equals_from_pretrained_and_save_pretrained(source, tmp_path):
    quantize_checkpoint(source, tmp_path / "a", CONFIG)
    BertForMaskedLM.from_pretrained(source, quantization_config=CONFIG).save_pretrained(tmp_path / "b")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_empty_target_folder_is_used(source, tmp_path):
    (tmp_path / "out").mkdir()
    quantize_checkpoint(source, tmp_path / "out", CONFIG)
    assert BertModel.from_pretrained(tmp_path / "out").is_quantized


@pytest.mark.parametrize("what", ["file", "folder"])
def test_target_that_is_in_use_is_refused_and_untouched(source, tmp_path, what):
    out = tmp_path / "out"
    if what == "file":
        out.write_text("mine")
    else:
        out.mkdir()
        (out / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="is there already and not empty"):
        quantize_checkpoint(source, out, CONFIG)
    assert (out if what == "file" else out / "mine.txt").read_text() == "mine"


def test_failure_leaves_nothing_behind(source, tmp_path):
    model = BertForMaskedLM(bert_config())
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight[3, 4] = torch.nan
    model.save_pretrained(source)
    place = tmp_path / "place"
    with pytest.raises(ValueError, match=r"encoder\.layer\.1\.output\.dense: .*NaN"):
        quantize_checkpoint(source, place / "out", CONFIG)
    assert list(place.iterdir()) == []


def test_full_disk_leaves_no_target_and_keeps_what_is_done(source, tmp_path, monkeypatch, caplog):
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("svdq_hf.checkpoint.quantize.copy_companions", full)
        with pytest.raises(OSError, match="No space left"):
            quantize_checkpoint(source, tmp_path / "place" / "out", CONFIG)
    kept = tmp_path / "place" / ".out.unfinished"
    assert list((tmp_path / "place").iterdir()) == [kept]
    assert f"what is done is kept in {kept}: run the same command again" in caplog.text
    # nothing is quantized again
    monkeypatch.setattr("svdq_hf.checkpoint.streaming.shard.quantize_weight", None)
    quantize_checkpoint(source, tmp_path / "place" / "out", CONFIG)
    assert list((tmp_path / "place").iterdir()) == [tmp_path / "place" / "out"]


def test_full_disk_leaves_nothing_of_a_model_quantized_in_memory(source, tmp_path, monkeypatch):
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("svdq_hf.checkpoint.quantize.copy_companions", full)
    config = SVDQConfig(k=16, lm_head=True)  # with a bias that is tied too
    with pytest.raises(OSError, match="No space left"):
        quantize_checkpoint(source, tmp_path / "place" / "out", config)
    assert list((tmp_path / "place").iterdir()) == []


@pytest.mark.slow
def test_kill_in_the_middle_leaves_no_target(source, tmp_path):
    # The child stops itself, by signal, after the weights are written and before the last rename.
    code = (
        "import os, signal, svdq_hf, svdq_hf.checkpoint.quantize as c;"
        "c.copy_companions = lambda *a: os.kill(os.getpid(), signal.SIGKILL);"
        f"c.quantize_checkpoint({str(source)!r}, {str(tmp_path / 'out')!r}, svdq_hf.SVDQConfig(k=16))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    quantize_checkpoint(source, tmp_path / "out", CONFIG)  # the next run is not in the way of itself
    assert read_footprint(tmp_path / "out").layers


def test_quantized_model_is_not_quantized_again(source, tmp_path):
    quantize_checkpoint(source, tmp_path / "once", CONFIG)
    with pytest.raises(ValueError, match="quantized already, by 'svdq'"):
        quantize_checkpoint(tmp_path / "once", tmp_path / "twice", CONFIG)


@pytest.mark.parametrize(
    ("missing", "message"),
    [("config.json", "no config.json"), ("model.safetensors", "pickled weights are not read")],
)
def test_folder_that_is_no_safe_model_is_refused(source, tmp_path, missing, message):
    (source / missing).unlink()
    with pytest.raises(ValueError, match=message):
        quantize_checkpoint(source, tmp_path / "out", CONFIG)


@pytest.mark.parametrize("name", ["./nowhere", "/no/where", "a/b/c"])
def test_path_that_is_not_there_is_not_taken_for_a_hub_name(name):
    with pytest.raises(ValueError, match="no such folder"):
        local_folder(name)


def test_quantizing_keeps_the_file_times_of_the_source(source, tmp_path):
    before = {file: (file.stat().st_mtime_ns, file.stat().st_size) for file in source.iterdir()}
    time.sleep(0.01)
    quantize_checkpoint(source, tmp_path / "out", CONFIG)
    assert {file: (file.stat().st_mtime_ns, file.stat().st_size) for file in source.iterdir()} == before


@pytest.fixture
def small_disk():
    """No file may become larger than some kilobytes, as on a disk that is full by then."""
    resource = pytest.importorskip("resource", reason="needs limits of a process: not on Windows")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("way", ["streamed", "in memory"])
def test_a_full_disk_is_named(way, source, tmp_path, small_disk):
    config = CONFIG if way == "streamed" else SVDQConfig(k=16, lm_head=True)
    with pytest.raises(OSError, match=rf"disk of {tmp_path / 'place'} cannot take .*another disk") as caught:
        quantize_checkpoint(source, tmp_path / "place" / "out", config)
    assert caught.value.errno == errno.EFBIG


def test_a_full_disk_is_named_by_export(source, tmp_path, request):
    quantize_checkpoint(source, tmp_path / "packed", CONFIG)
    request.getfixturevalue("small_disk")
    with pytest.raises(OSError, match=rf"the disk of {tmp_path} cannot take what is written"):
        export_dense(tmp_path / "packed", tmp_path / "out")


def test_an_error_of_another_kind_is_left_as_it_is(tmp_path):
    with pytest.raises(FileNotFoundError, match="none"), full_disk_named(tmp_path):
        (tmp_path / "none").read_text()
