"""`svdq bench`: what it prints, in JSON and in 60 columns, and what it refuses."""

import json
import re

import pytest
from near_process import NearProcess
from tiny_models import bert, llama

from svdq_hf import SVDQConfig, quantize_model
from svdq_hf.cli.bench import WORDS
from svdq_hf.cli.bench_tables import kernel_lines
from svdq_hf.cli.command import main
from svdq_hf.evaluation.speed import bench, variants


@pytest.fixture(autouse=True)
def near(monkeypatch):
    monkeypatch.setattr(bench, "ModelProcess", NearProcess)


@pytest.fixture
def folder(tmp_path):
    quantize_model(llama(), SVDQConfig(k=4)).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


QUICK = ["--seconds", "0", "--tokens", "4", "8"]


def test_a_table_of_60_columns(folder, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "60")
    assert main(["bench", folder, *QUICK, "--only", "svdq", "fp32"]) == 0
    shown = capsys.readouterr()
    text = re.sub(r"\x1b\[[\d;]*m", "", shown.out)
    assert max(map(len, text.splitlines())) <= 60
    for word in ("LlamaForCausalLM", "decode", "8 tokens", "running", "quantized layers", "kernels of"):
        assert word in text
    assert "times as fast as dense FP32: decoding" in " ".join(text.split())
    assert "loading dense FP32 ..." in shown.err


def test_json_says_the_same_and_nothing_else(folder, capsys):
    assert main(["bench", folder, *QUICK, "--only", "svdq", "fp32", "--json"]) == 0
    shown = capsys.readouterr()
    told = json.loads(shown.out)
    assert set(told["variants"]) == {"svdq", "fp32"}
    assert told["variants"]["svdq"]["tokens_per_second"].keys() == {"decode", "4", "8"}
    assert "loading dense" not in shown.err


def test_an_encoder_in_one_variant(tmp_path, capsys):
    bert().save_pretrained(tmp_path)
    assert main(["bench", str(tmp_path), *QUICK, "--only", "fp32"]) == 0
    shown = capsys.readouterr().out
    assert "decode" not in shown
    assert "Nothing to compare with" in shown


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["/not/there"], "/not/there: no such folder"),
        (["FOLDER", "--preset", "best"], "preset: FOLDER is quantized already; leave that out"),
        (["FOLDER", "--dense", "/not/there"], "/not/there: no such folder"),
        (["FOLDER", "--only", "nf4"], "bitsandbytes NF4: "),
        (["FOLDER", "--threads", "0"], "threads=0: must be at least 1"),
    ],
)
def test_wrong_things_get_one_line(folder, capsys, arguments, told):
    assert main(["bench", *(one.replace("FOLDER", folder) for one in arguments)]) == 1
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert line.startswith(f"svdq bench: {told.replace('FOLDER', folder)}")


def test_neighbouring_numbers_of_tokens_share_a_line():
    one = {"out": 8, "in_features": 64, "layers": 2, "why_not_better": ["no AVX"]}
    same = {"1": "registers", "8": "registers", "512": "rows"}
    paths = [{**one, "ways": same}, {**one, "out": 16, "ways": same}, {**one, "ways": {"1": "registers"}}]
    assert list(kernel_lines(paths)) == [
        "kernels of 8 x 64 (2), 16 x 64 (2):",
        "  1, 8 tokens: registers",
        "  512 tokens: rows",
        "kernels of 8 x 64 (2):",
        "  1 token: registers",
        "  not faster, since no AVX",
    ]


def test_the_words_are_those_of_the_variants():
    assert set(WORDS) == set(variants.WORDS)
