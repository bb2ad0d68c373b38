"""`svdq compare`: what is printed, in a narrow terminal and as JSON, and what is refused."""

import json

import letters
import pytest
from rich.console import Console

from svdq_hf import SVDQConfig
from svdq_hf.cli.command import _parse, main
from svdq_hf.cli.compare import configs_of, tables
from svdq_hf.evaluation.comparison.table import Row

QUICKLY = ["--no-speed", "--tokens", "100", "--context", "32"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(letters.saved("causal", tmp_path_factory.mktemp("compare") / "model"))


def test_one_command_prints_table_verdict_and_what_is_next(model, capsys, tmp_path):
    out = tmp_path / "out"
    assert (
        main(["compare", model, "--preset", "default", "--preset", "small", *QUICKLY, "--out", str(out)]) == 0
    )
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert lines[0].split() == ["model", "svdq", "svdq-small"]
    assert any(line.startswith("change of loss") for line in lines)
    assert any(line.startswith("svdq-small changes the loss by ") for line in lines)
    assert "100 tokens of the text that comes along, context 32; in " in printed.out
    assert f"read {out}/compare.html" in printed.out
    assert (out / "compare.html").is_file()
    assert "svdq-small: quantizing" in printed.err
    assert "Traceback" not in printed.err


def test_json_has_the_fields_and_nothing_else_is_printed(model, capsys):
    assert main(["compare", model, "--k", "4", "--lm-head", *QUICKLY, "--json"]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert printed.err == ""
    assert list(found) == [
        "measured_on",
        "counted",
        "n",
        "reference",
        "others",
        "seconds",
        "notes",
        "page",
        "cards",
    ]
    (ours,) = found["others"]
    assert ours["name"] == "svdq k=4 lm_head"
    assert ours["quantization"]["lm_head"] is True
    assert sorted(ours["quality"]["kl"]) == ["high", "low", "value"]
    assert {"bytes", "bits", "dense_share", "speed", "verdict", "advice", "folder"} <= ours.keys()
    assert found["n"] == 100


@pytest.mark.parametrize(
    ("arguments", "made"),
    [
        ([], []),
        (["--preset", "default"], [SVDQConfig()]),
        (["--preset", "best", "--preset", "small"], [SVDQConfig.best(), SVDQConfig.small()]),
        (["--bits", "8"], [SVDQConfig(bits=8)]),
        (["--preset", "best", "--lm-head"], [SVDQConfig.best(lm_head=True)]),
    ],
)
def test_presets_and_choices_make_configs(arguments, made):
    assert configs_of(_parse(["compare", "a", *arguments])) == made


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("models", [2, 3, 6])
def test_the_table_fits_the_terminal_and_hides_nothing(width, models, capsys):
    names = [f"model-with-a-long-name-{number}" for number in range(models)]
    row = Row("prefill, tokens/s", [f"{number}234.56" for number in range(models)])
    screen = Console(width=width)
    with screen.capture() as captured:
        for table in tables(names, [row], screen.width):
            screen.print(table)
    printed = captured.get()
    assert max(map(len, printed.splitlines())) <= width
    assert all(text in printed for text in row.texts)
    assert printed.count("0234.56") == printed.count(
        "prefill, tokens/s"
    )  # each part begins with the reference


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["./nowhere"], "./nowhere: no such folder"),
        (["MODEL", "MODEL"], "given twice; compare it with another folder"),
        (["MODEL", "--text", "nowhere.txt"], "--text nowhere.txt: no such file"),
        (["MODEL", "--task", "rte"], "for classifiers of texts"),
        (["MODEL", "--card"], "--card: none of the compared models"),
        (["MODEL", "--k", "4", "--target-bits", "5"], "--target-bits spends salient weights instead of --k"),
        (["MODEL", "--tokens", "0"], "tokens=0: must be a whole number from 2 on"),
    ],
)
def test_refusal_is_one_line(arguments, message, model, capsys):
    assert main(["compare", *(model if one == "MODEL" else one for one in arguments)]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("svdq compare: ")
    assert message in printed.err
    assert printed.err.count("\n") == 1


def test_an_unknown_preset_is_told_the_nearest(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["compare", "a", "--preset", "bset"])
    assert "did you mean best?" in capsys.readouterr().err
