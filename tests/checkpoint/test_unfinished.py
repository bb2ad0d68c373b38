"""The output folder and the hidden one beside it: what cannot be replaced, or is not svdq's, is refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from tiny_models import llama

import svdq_hf.checkpoint.folders
from svdq_hf import SVDQConfig, quantize_model
from svdq_hf.checkpoint import estimate_checkpoint, export_dense, quantize_checkpoint
from svdq_hf.checkpoint.folders import check_target
from svdq_hf.checkpoint.unfinished import unfinished_folder

CONFIG = SVDQConfig(k=4)
IN_MEMORY = SVDQConfig(k=4, error_feedback="synthetic")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    llama().save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


@pytest.fixture
def quantized(tmp_path: Path) -> Path:
    quantize_model(llama(), CONFIG).save_pretrained(tmp_path / "quantized")
    return tmp_path / "quantized"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(one.relative_to(folder)): one.read_bytes() for one in folder.rglob("*") if one.is_file()}


def foreign(kind: str, hidden: Path) -> Path:
    """Something at the hidden folder's place that svdq has not made; returns where its files are."""
    other = hidden.parent / "precious"
    other.mkdir()
    (other / "data.txt").write_text("mine")
    if kind == "link":
        hidden.symlink_to(other)
    elif kind == "link inside":
        hidden.mkdir()
        (hidden / "lock").touch()
        (hidden / "model").symlink_to(other)
    elif kind == "link as lock":
        hidden.mkdir()
        (hidden / "lock").symlink_to(other / "data.txt")
    elif kind == "file":
        hidden.write_text("mine")
    elif kind == "unknown file":
        shutil.copytree(other, hidden)
        (hidden / "lock").touch()
    elif kind == "not begun":
        (hidden / "model").mkdir(parents=True)
        (hidden / "model" / "data.txt").write_text("mine")
    return other


KINDS = ["link", "link inside", "link as lock", "file", "unknown file", "not begun"]


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("config", [CONFIG, IN_MEMORY], ids=["streamed", "in memory"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_hidden_folder_that_is_not_ours_is_refused_and_untouched(kind, config, restart, source, tmp_path):
    hidden = unfinished_folder(tmp_path / "out")
    foreign(kind, hidden)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="svdq works only in a folder that it has made; move or remove it"):
        quantize_checkpoint(source, tmp_path / "out", config, restart=restart)
    assert contents(tmp_path) == before


def test_export_and_dry_run_refuse_it_too(source, quantized, tmp_path):
    foreign("link", unfinished_folder(tmp_path / "out"))
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="is a symbolic link, and svdq works only"):
        export_dense(quantized, tmp_path / "out")
    with pytest.raises(ValueError, match="is a symbolic link, and svdq works only"):
        estimate_checkpoint(source, tmp_path / "out", CONFIG)
    assert contents(tmp_path) == before


def test_a_folder_of_another_user_is_refused(source, tmp_path, monkeypatch):
    unfinished_folder(tmp_path / "out").mkdir()
    mine = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: mine + 1)
    with pytest.raises(ValueError, match="belongs to another user"):
        quantize_checkpoint(source, tmp_path / "out", CONFIG)


def linked(out: Path) -> None:
    (out.parent / "elsewhere").mkdir()
    out.symlink_to(out.parent / "elsewhere")


def dangling(out: Path) -> None:
    out.symlink_to(out.parent / "nowhere")


def in_a_file(out: Path) -> None:
    out.parent.rmdir()
    out.parent.write_text("a file")


REFUSED = {
    linked: "is a symbolic link to .*elsewhere, and a folder cannot take its place",
    dangling: "is a symbolic link to .*nowhere",
    in_a_file: "is a file, no folder",
}


@pytest.mark.parametrize("spoil", REFUSED, ids=lambda spoil: spoil.__name__)
def test_an_output_that_could_not_be_put_in_place_is_told_before_the_work(
    spoil, source, quantized, tmp_path, monkeypatch
):
    (tmp_path / "place").mkdir()
    out = tmp_path / "place" / "out"
    spoil(out)
    monkeypatch.setattr("svdq_hf.checkpoint.export.load_complete", None)
    monkeypatch.setattr("svdq_hf.checkpoint.quantize.make_plan", None)
    for refused in (
        lambda: quantize_checkpoint(source, out, CONFIG),
        lambda: export_dense(quantized, out),
        lambda: estimate_checkpoint(source, out, CONFIG),
    ):
        with pytest.raises(ValueError, match=REFUSED[spoil]):
            refused()


@pytest.mark.parametrize("kind", ["another file system", "the same one"])
def test_a_mount_point_is_refused(kind, quantized, tmp_path, monkeypatch):
    (tmp_path / "with space").mkdir()
    out = tmp_path / "with space"
    if kind == "another file system":
        monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == out)
    else:
        line = f"26 1 0:24 / {str(out).replace(' ', chr(92) + '040')} rw shared:1 - ext4 /dev/sda rw\n"
        (tmp_path / "mountinfo").write_text(line)
        monkeypatch.setattr(svdq_hf.checkpoint.folders, "MOUNTS", tmp_path / "mountinfo")
    with pytest.raises(ValueError, match="is a mount point, and cannot be replaced; name a folder in it"):
        export_dense(quantized, out)
    check_target(out / "model")


@pytest.mark.parametrize("name", ["model-\udcff", "a\0b"])
def test_a_name_that_is_no_text_is_refused(name, source, tmp_path):
    for arguments in ((source, tmp_path / name), (tmp_path / name, tmp_path / "out")):
        with pytest.raises(ValueError, match=r"(\\udcff|\\x00).*this name is not UTF-8 text"):
            quantize_checkpoint(*arguments, CONFIG)
    with pytest.raises(ValueError, match="this name is not UTF-8 text"):
        export_dense(source, tmp_path / name)


@pytest.mark.parametrize("name", ["..", "sub/.."])
def test_an_output_without_a_name_of_its_own_is_refused(name, tmp_path, monkeypatch):
    (tmp_path / "deep" / "sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "deep" / "sub")
    with pytest.raises(ValueError, match=r"is there already|does not end with the name of a folder"):
        check_target(name)


# What kill -9 leaves.

KILLED = (
    "import os, signal, sys, svdq_hf, svdq_hf.checkpoint.{module} as c\n"
    "c.copy_companions = lambda *a: os.kill(os.getpid(), signal.SIGKILL)\n"
    "{call}\n"
)


@pytest.mark.slow
@pytest.mark.parametrize("killed", ["in memory", "exported"])
def test_the_next_run_removes_what_a_killed_one_has_left(killed, source, quantized, tmp_path):
    """Of whichever kind it is; each finds a copy of what the one killed process has left."""
    out = tmp_path / "place" / "out"
    config = "svdq_hf.SVDQConfig(k=4, error_feedback='synthetic')"
    calls = {
        "in memory": ("quantize", f"c.quantize_checkpoint({str(source)!r}, {str(out)!r}, {config})"),
        "exported": ("export", f"c.export_dense({str(quantized)!r}, {str(out)!r})"),
    }
    module, call = calls[killed]
    code = KILLED.format(module=module, call=call)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [one.name for one in out.parent.iterdir()] == [".out.unfinished"]
    assert (unfinished_folder(out) / "model" / "config.json").exists()
    nexts: list[Callable[[Path], object]] = [
        partial(quantize_checkpoint, source, config=IN_MEMORY),
        partial(quantize_checkpoint, source, config=CONFIG),
        partial(export_dense, quantized),
    ]
    for place, run in enumerate(nexts):
        copy = shutil.copytree(out.parent, tmp_path / str(place)) / "out"
        run(copy)
        assert list(copy.parent.iterdir()) == [copy]


@pytest.mark.parametrize("config", [CONFIG, IN_MEMORY], ids=["streamed", "in memory"])
def test_what_earlier_releases_have_left_is_removed_and_nothing_else(config, source, tmp_path):
    place = tmp_path / "place"
    ours, other, original = (place / f".out.{end}" for end in ("a1b2_c3d", "backup01", "original"))
    shutil.copytree(source, ours / "model")
    ours.chmod(0o700)  # as tempfile makes them
    shutil.copytree(source, other / "weights")
    shutil.copytree(source, original / "model")  # a user's own: anybody may read it
    (place / ".other.a1b2_c3d").mkdir()
    quantize_checkpoint(source, place / "out", config)
    assert {one.name for one in place.iterdir()} == {
        "out",
        ".out.backup01",
        ".out.original",
        ".other.a1b2_c3d",
    }


def test_work_in_one_go_does_not_throw_away_what_a_streamed_run_has_done(source, tmp_path, monkeypatch):
    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("svdq_hf.checkpoint.quantize.copy_companions", stop)
        with pytest.raises(KeyboardInterrupt):
            quantize_checkpoint(source, tmp_path / "out", CONFIG)
    kept = contents(unfinished_folder(tmp_path / "out"))
    assert json.loads(kept["plan.json"])["config"]
    with pytest.raises(ValueError, match="has what a run with other choices has done, which was cut off"):
        quantize_checkpoint(source, tmp_path / "out", IN_MEMORY)
    assert contents(unfinished_folder(tmp_path / "out")) == kept
    quantize_checkpoint(source, tmp_path / "out", IN_MEMORY, restart=True)
    assert not unfinished_folder(tmp_path / "out").exists()


def test_two_runs_in_memory_are_kept_apart(source, quantized, tmp_path):
    import fcntl

    hidden = unfinished_folder(tmp_path / "out")
    hidden.mkdir()
    with open(hidden / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(OSError, match="another run is at work there"):
            quantize_checkpoint(source, tmp_path / "out", IN_MEMORY)
        with pytest.raises(OSError, match="another run is at work there"):
            export_dense(quantized, tmp_path / "out")
    assert hidden.is_dir()
