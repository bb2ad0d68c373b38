"""`svdq spectrum`: tables of one and of two models, JSON, the picture, and what is refused."""

import json

import pytest
import tiny_models as tiny
from rich.console import Console
from transformers import BertModel, BertTokenizerFast

from svdq_hf import SVDQConfig, quantize_model
from svdq_hf.cli import main

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "it", "rains", "again", "and"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A dense model, the same quantized, and a text."""
    folder = tmp_path_factory.mktemp("spectrum")
    model = BertModel(tiny.bert_config())
    model.save_pretrained(folder / "dense")
    quantize_model(model, SVDQConfig(k=16)).save_pretrained(folder / "quantized")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    for name in ("dense", "quantized"):
        BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder / name)
    (folder / "text.txt").write_text("it rains and rains again " * 4)
    return folder


def test_one_model_as_a_table_and_as_json(folders, capsys):
    assert main(["spectrum", str(folders / "dense")]) == 0
    printed = capsys.readouterr().out
    assert "sigma 1" in printed
    assert "PCDR" not in printed
    assert main(["spectrum", str(folders / "dense"), "--json"]) == 0
    (model,) = json.loads(capsys.readouterr().out)["models"]
    layer = model["layers"]["encoder.layer.0.output.dense"]
    assert layer["shape"] == [64, 96]
    assert len(layer["values"]) == 10
    assert layer["pcdr"] is None


def test_two_models_with_a_text_and_a_picture(folders, capsys, tmp_path):
    pytest.importorskip("matplotlib", reason="needs the extra: pip install -e '.[evaluate]'")
    both, out = [str(folders / name) for name in ("dense", "quantized")], tmp_path / "spectra.svg"
    assert (
        main(["spectrum", *both, "--text", str(folders / "text.txt"), "--tokens", "16", "--out", str(out)])
        == 0
    )
    printed = capsys.readouterr().out
    assert "PCDR" in printed
    assert " > " in printed
    assert out.read_text().startswith("<?xml")


def test_sixty_columns_hold_the_table(folders, capsys, monkeypatch):
    monkeypatch.setattr("svdq_hf.cli.tables.console", lambda: Console(width=60))
    both = [str(folders / name) for name in ("dense", "quantized")]
    assert main(["spectrum", *both, "--text", str(folders / "text.txt")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 60
    assert any("outliers" in line for line in lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "nowhere.txt"], "--text nowhere.txt: no such file"),
        (["--tokens", "1"], "--tokens 1: must be 2 or more"),
        (["--out", "spectra.png"], "--out spectra.png: must end with .svg"),
        (["--out", "no-folder/x.svg"], "--out no-folder/x.svg: no such folder: no-folder; make it"),
    ],
)
def test_options_are_refused_before_a_model_is_loaded(arguments, message, capsys):
    assert main(["spectrum", "no-model", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_two_models_of_different_layers_are_refused(folders, capsys, tmp_path):
    BertModel(tiny.bert_config(num_hidden_layers=1)).save_pretrained(tmp_path / "other")
    assert main(["spectrum", str(folders / "dense"), str(tmp_path / "other")]) == 1
    assert "have different layers" in capsys.readouterr().err
