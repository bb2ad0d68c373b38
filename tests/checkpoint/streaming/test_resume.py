"""A run that is cut off goes on with what is missing, and gives what one run would have given."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from streamed import contents, files
from tiny_models import llama

import svdq_hf.checkpoint.streaming.resume
import svdq_hf.checkpoint.streaming.shard
from svdq_hf import SVDQConfig
from svdq_hf.checkpoint.quantize import quantize_checkpoint
from svdq_hf.checkpoint.source import Source
from svdq_hf.checkpoint.streaming.plan import make_plan
from svdq_hf.checkpoint.streaming.resume import stream
from svdq_hf.checkpoint.streaming.workers import _Workers
from svdq_hf.checkpoint.unfinished import unfinished_folder
from svdq_hf.cli.command import main

CONFIG = SVDQConfig(k=4)
SIZE = "20KB"
SHARDS = 5
CUT = 8
"""The layer at which a run is cut off, in the middle of the fourth shard."""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    llama().save_pretrained(tmp_path / "dense", max_shard_size="100KB")
    return tmp_path / "dense"


def in_one_run(source: Path) -> dict[str, bytes]:
    quantize_checkpoint(source, source.parent / "whole", CONFIG, shard_size=SIZE)
    return files(source.parent / "whole")


def quantized_names(monkeypatch: pytest.MonkeyPatch, stop_at: int | None = None) -> list[str]:
    """Names of the layers that are quantized from now on; an interrupt comes at one of them."""
    names: list[str] = []
    real = svdq_hf.checkpoint.streaming.shard.quantize_weight

    def counted(weight, config, name):
        if len(names) == stop_at:
            raise KeyboardInterrupt
        names.append(name)
        return real(weight, config, name)

    monkeypatch.setattr(svdq_hf.checkpoint.streaming.shard, "quantize_weight", counted)
    return names


def cut_off(source: Path, out: Path) -> list[int]:
    """Cut a run off; numbers of the shards that were finished."""
    with pytest.MonkeyPatch.context() as patched:
        quantized_names(patched, CUT)
        with pytest.raises(KeyboardInterrupt):
            quantize_checkpoint(source, out, CONFIG, shard_size=SIZE)
    assert not out.exists()
    return sorted(int(file.stem) for file in unfinished_folder(out).glob("0*.json"))


def test_next_run_makes_only_the_shards_that_are_missing(source, tmp_path, monkeypatch):
    expected = in_one_run(source)
    before = files(source)
    assert cut_off(source, tmp_path / "out") == [1, 2, 3]
    names = quantized_names(monkeypatch)
    quantize_checkpoint(source, tmp_path / "out", CONFIG, shard_size=SIZE)
    assert files(tmp_path / "out") == expected
    assert 0 < len(names) < 14
    assert not any("layers.0.self_attn.q_proj" in name for name in names)  # of the first shards
    assert not unfinished_folder(tmp_path / "out").exists()
    assert files(source) == before


@pytest.mark.slow
def test_kill_in_the_middle_of_a_shard(source, tmp_path, monkeypatch):
    expected = in_one_run(source)
    out = tmp_path / "out"
    code = (
        "import os, signal, sys, svdq_hf.checkpoint.streaming.shard as s\n"
        "from svdq_hf.cli.command import main\n"
        "real, count = s.quantize_weight, []\n"
        "def dying(*arguments):\n"
        "    count.append(1)\n"
        f"    if len(count) == {CUT}: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(*arguments)\n"
        "s.quantize_weight = dying\n"
        "main(sys.argv[1:])\n"
    )
    arguments = ["quantize", str(source), str(out), "--k", "4", "--shard-size", SIZE]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not out.exists()
    names = quantized_names(monkeypatch)
    assert main([*arguments, "--json"]) == 0
    assert files(out) == expected
    assert 0 < len(names) < 14


@pytest.mark.parametrize("whole", [False, True], ids=["before its header", "with its header"])
def test_damaged_data_of_the_first_run_are_made_again(whole, source, tmp_path, monkeypatch):
    expected = in_one_run(source)
    out = tmp_path / "out"
    if whole:
        with monkeypatch.context() as patched:
            patched.setattr(svdq_hf.checkpoint.streaming.plan.StreamPlan, "write_config", None)
            with pytest.raises(TypeError):
                quantize_checkpoint(source, out, CONFIG, shard_size=SIZE)
        damaged = unfinished_folder(out) / "model" / "model-00002-of-00005.safetensors"
    else:
        cut_off(source, out)
        damaged = unfinished_folder(out) / "00002.data"
    data = bytearray(damaged.read_bytes())
    data[-5] ^= 1
    damaged.write_bytes(data)
    quantize_checkpoint(source, out, CONFIG, shard_size=SIZE)
    assert files(out) == expected


@pytest.mark.parametrize("text", ["", "x", "{", "{}", "[]", "null", "[" * 10**5])
def test_damaged_records_of_the_first_run_are_made_again(text, source, tmp_path):
    expected = in_one_run(source)
    cut_off(source, tmp_path / "out")
    (unfinished_folder(tmp_path / "out") / "00001.json").write_text(text)
    quantize_checkpoint(source, tmp_path / "out", CONFIG, shard_size=SIZE)
    assert files(tmp_path / "out") == expected


@pytest.mark.parametrize("key", ["made", "inputs", "facts"])
@pytest.mark.parametrize("value", [None, [], {}, 7, {"a": 1}])
def test_record_without_what_it_must_have_counts_for_nothing(key, value, source, tmp_path):
    expected = in_one_run(source)
    cut_off(source, tmp_path / "out")
    record = unfinished_folder(tmp_path / "out") / "00002.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {key: value}))
    quantize_checkpoint(source, tmp_path / "out", CONFIG, shard_size=SIZE)
    assert files(tmp_path / "out") == expected


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"input": 7}'])
def test_damaged_plan_of_the_first_run_is_refused_with_the_remedy(text, source, tmp_path):
    out = tmp_path / "out"
    cut_off(source, out)
    (unfinished_folder(out) / "plan.json").write_text(text)
    with pytest.raises(ValueError, match="--restart"):
        quantize_checkpoint(source, out, CONFIG, shard_size=SIZE)
    quantize_checkpoint(source, out, CONFIG, shard_size=SIZE, restart=True)
    assert files(out) == in_one_run(source)


def change_a_weight(source: Path) -> None:
    file = source / "model-00001-of-00003.safetensors"
    tensors = load_file(file)
    tensors["model.embed_tokens.weight"][0, 0] += 1
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("restart", [False, True])
def test_changed_input_is_refused_and_begun_anew_on_request(restart, source, tmp_path):
    out = tmp_path / "out"
    assert cut_off(source, out)
    kept = files(unfinished_folder(out))
    change_a_weight(source)
    if not restart:
        with pytest.raises(ValueError, match=r"embed_tokens\.weight is not what it was .*--restart"):
            quantize_checkpoint(source, out, CONFIG, shard_size=SIZE)
        assert files(unfinished_folder(out)) == kept
    else:
        quantize_checkpoint(source, out, CONFIG, shard_size=SIZE, restart=True)
        assert files(out) == in_one_run(source)


@pytest.mark.parametrize(
    ("config", "size", "words"),
    [
        (SVDQConfig(k=5, rank=4), SIZE, r"another config \(k, rank\)"),
        (CONFIG, "30KB", "another shard size"),
    ],
)
def test_other_choices_are_refused_and_told(config, size, words, source, tmp_path):
    cut_off(source, tmp_path / "out")
    with pytest.raises(ValueError, match=f"{words}.*--restart"):
        quantize_checkpoint(source, tmp_path / "out", config, shard_size=size)


def test_another_model_is_refused_and_told(source, tmp_path):
    cut_off(source, tmp_path / "out")
    shutil.rmtree(source)
    llama(num_hidden_layers=1).save_pretrained(source)
    with pytest.raises(ValueError, match=r"another input \(model-00001-of-00003.safetensors, "):
        quantize_checkpoint(source, tmp_path / "out", CONFIG, shard_size=SIZE)


def test_another_release_of_torch_is_refused(source, tmp_path, monkeypatch):
    cut_off(source, tmp_path / "out")
    monkeypatch.setattr(svdq_hf.checkpoint.streaming.resume, "version", lambda package: "7")
    with pytest.raises(ValueError, match=r"another release \(svdq_hf, torch\)"):
        quantize_checkpoint(source, tmp_path / "out", CONFIG, shard_size=SIZE)


def test_a_run_begun_by_plain_torch_does_not_go_on_natively(source, tmp_path, monkeypatch):
    cut_off(source, tmp_path / "out")
    monkeypatch.setattr(svdq_hf.checkpoint.streaming.resume, "made_by", lambda: "neither")
    with pytest.raises(ValueError, match=r"another release \(native library\): .* --restart"):
        quantize_checkpoint(source, tmp_path / "out", CONFIG, shard_size=SIZE)


def test_two_runs_for_one_folder_are_kept_apart(source, tmp_path):
    cut_off(source, tmp_path / "out")
    with open(unfinished_folder(tmp_path / "out") / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(OSError, match="another run is at work there"):
            quantize_checkpoint(source, tmp_path / "out", CONFIG, shard_size=SIZE)
    quantize_checkpoint(source, tmp_path / "out", CONFIG, shard_size=SIZE)


def test_interrupt_at_the_keyboard_is_one_line_and_exit_code_130(
    source, tmp_path, monkeypatch, capsys, caplog
):
    quantized_names(monkeypatch, CUT)
    assert main(["quantize", str(source), str(tmp_path / "out"), "--k", "4", "--json"]) == 130
    assert capsys.readouterr().err == "svdq quantize: interrupted\n"
    assert "run the same command again to go on" in caplog.text


@pytest.mark.slow
def test_worker_that_dies_is_named_and_the_rest_goes_on(source, tmp_path, monkeypatch, capsys):
    expected = in_one_run(source)
    out = tmp_path / "out"
    real, dead = _Workers._hear, []

    def hear(self, pipe, shards, told):
        if not dead:  # at the first sign of life
            dead.append(self.processes[pipe].pid)
            os.kill(dead[0], signal.SIGKILL)
            self.processes[pipe].join()
        real(self, pipe, shards, told)

    monkeypatch.setattr(_Workers, "_hear", hear)
    arguments = [
        "quantize",
        str(source),
        str(out),
        "--k",
        "4",
        "--shard-size",
        SIZE,
        "--workers",
        "2",
        "--json",
    ]
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert f"(process {dead[0]}) died by signal 9 at model-0000" in error
    assert "Run the same command again" in error
    assert not out.exists()
    made = {int(file.stem) for file in unfinished_folder(out).glob("0*.json")}
    assert len(made) >= SHARDS - 1
    monkeypatch.setattr(_Workers, "_hear", real)
    names = quantized_names(monkeypatch)
    assert main([*arguments[:-3], "--json"]) == 0
    assert files(out) == expected
    assert len(names) <= 4


@pytest.mark.slow
def test_error_of_a_worker_is_told_as_it_is(source, tmp_path, capsys):
    file = source / "model-00002-of-00003.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("proj.weight"))
    tensors[name][3, 4] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    arguments = ["--shard-size", SIZE, "--workers", "2", "--json"]
    assert main(["quantize", str(source), str(tmp_path / "out"), *arguments]) == 1
    error = capsys.readouterr().err
    assert f"could not quantize {name.removesuffix('.weight')}: weight has a NaN" in error
    assert {path.name for path in tmp_path.iterdir()} == {"dense"}


@pytest.mark.slow
def test_accelerate_splits_the_shards_over_its_processes(source, tmp_path):
    expected = in_one_run(source)
    launch = [str(Path(sys.executable).parent / "accelerate"), "launch", "--cpu", "--num_processes", "2"]
    command = [*launch, "-m", "svdq_hf", "quantize", str(source), str(tmp_path / "out")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [*command, "--k", "4", "--shard-size", SIZE],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert files(tmp_path / "out") == expected
    assert done.stdout.count("svdq inspect") == 1


class Rank:
    """What `stream` asks of accelerate's PartialState, for a process of two."""

    num_processes = 2

    def __init__(self, index: int) -> None:
        self.process_index, self.is_main_process = index, index == 0

    def wait_for_everyone(self) -> None:
        pass


def test_each_process_makes_its_own_shards_and_the_first_puts_them_together(source, tmp_path, monkeypatch):
    expected = in_one_run(source)
    monkeypatch.setattr(svdq_hf.checkpoint.streaming.resume, "PartialState", lambda: Rank(0))
    with pytest.raises(
        OSError, match=r"model-00002-of-00005\.safetensors is not there; do all processes see"
    ):
        quantize_checkpoint(source, tmp_path / "out", CONFIG, shard_size=SIZE)
    work = unfinished_folder(tmp_path / "out")
    assert {int(file.stem) for file in work.glob("0*.json")} == {1, 3, 5}
    monkeypatch.setattr(svdq_hf.checkpoint.streaming.resume, "PartialState", lambda: Rank(1))
    plan = make_plan(Source.resolve(source), CONFIG, 20_000)
    stream(plan, work, lambda folder: pytest.fail("only the first process finishes"))
    assert {int(file.stem) for file in work.glob("0*.json")} == {1, 2, 3, 4, 5}
    monkeypatch.setattr(svdq_hf.checkpoint.streaming.resume, "PartialState", lambda: Rank(0))
    quantize_checkpoint(source, tmp_path / "out", CONFIG, shard_size=SIZE)
    assert files(tmp_path / "out") == expected


def test_facts_of_all_shards_are_in_every_header(source):
    in_one_run(source)
    _, told = contents(source.parent / "whole")
    facts = json.loads(json.loads(told.pop())["svdq_layers"])
    assert not told
    assert len(facts) == 14
    assert all(set(fact) == {"shape", "relative_error", "sigma_ratio"} for fact in facts.values())
