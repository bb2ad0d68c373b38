"""`svdq inspect`: totals, the worst layers, two folders; at 60 columns and in a pipe."""

import json
import os
import subprocess
import sys

import pytest
import torch
from tiny_models import bert_config
from transformers import BertModel

from svdq_hf import SVDQConfig, quantize_model, read_footprint
from svdq_hf.cli.command import main


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One model in 4 bits and in 3, the pooler dense in the second."""
    place = tmp_path_factory.mktemp("inspect")
    for name, choices in {"four": {}, "three": {"bits": 3, "modules_to_not_convert": ["pooler"]}}.items():
        torch.manual_seed(0)
        model = BertModel(bert_config(num_hidden_layers=3, vocab_size=4000))
        quantize_model(model, SVDQConfig(k=2, **choices)).save_pretrained(place / name)
    return place


def printed(capsys, *arguments):
    assert main(["inspect", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def layers_in(text, folder):
    """Names of a folder's layers in the order in which a text has them."""
    names = [layer.name for layer in read_footprint(folder).layers]
    table = text.partition("quantized layers")[2]
    return sorted((name for name in names if name in table), key=table.index)


def test_totals_come_first_and_then_the_worst_layers(folders, capsys):
    text = printed(capsys, folders / "four", "--top", "3")
    assert text.index("totals") < text.index("3 of 19 quantized layers: largest relative error")
    errors = {layer.name: layer.facts["relative_error"] for layer in read_footprint(folders / "four").layers}
    worst = sorted(errors, key=errors.__getitem__, reverse=True)
    assert layers_in(text, folders / "four") == worst[:3]
    assert f"{worst[0]}\n" in "".join(line.rstrip() + "\n" for line in text.splitlines())
    assert "embeddings.word_embeddings.weight, 1.0 MB in FP32" in text
    assert "--embeddings" in text


def test_layers_are_sorted_as_asked_and_all_are_shown_on_request(folders, capsys):
    folder = folders / "four"
    text = printed(capsys, folder, "--sort", "name", "--all")
    assert layers_in(text, folder) == [layer.name for layer in read_footprint(folder).layers]
    sizes = {layer.name: layer.stored_bytes for layer in read_footprint(folder).layers}
    found = [sizes[name] for name in layers_in(printed(capsys, folder, "--sort", "size", "--all"), folder)]
    assert found == sorted(found, reverse=True)


def test_two_folders_are_compared_in_config_bits_and_errors(folders, capsys):
    text = printed(capsys, folders / "four", folders / "three", "--top", "2")
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "bits 4 3" in lines
    assert "modules_to_not_convert None ['pooler']" in lines
    assert "quantized layers 19 18" in lines
    assert "2 of 19 layers, largest change of error first" in text
    assert "saliency" not in text  # the same in both
    told = json.loads(printed(capsys, folders / "four", folders / "three", "--json"))
    assert told["config"] == {"bits": [4, 3], "modules_to_not_convert": [None, ["pooler"]]}
    assert told["b"]["totals"]["bits_per_weight"] < told["a"]["totals"]["bits_per_weight"]


def test_what_cannot_be_inspected_is_refused(folders, capsys):
    assert main(["inspect", str(folders / "four"), "--top", "0"]) == 1
    assert "--top 0: must be 1 or more" in capsys.readouterr().err
    assert main(["inspect", str(folders / "four"), str(folders)]) == 1
    assert "no *.safetensors file is there" in capsys.readouterr().err


IN_A_TERMINAL = """
import os, pty, sys
os.environ["COLUMNS"] = sys.argv[1]
chunks = []
def read(fd):
    chunks.append(os.read(fd, 4096))
    return chunks[-1]
code = pty.spawn([sys.executable, "-m", "svdq_hf", "inspect", *sys.argv[2:]], read)
sys.exit(os.waitstatus_to_exitcode(code))
"""


@pytest.mark.skipif(os.name != "posix", reason="there is no pseudo terminal here")
def test_no_line_is_wider_than_a_terminal_of_60_columns(folders):
    both = [str(folders / "four"), str(folders / "three")]
    for arguments in (both[:1], both):
        command = [sys.executable, "-c", IN_A_TERMINAL, "60", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        plain = "".join(piece.partition("m")[2] for piece in f"m{done.stdout}".split("\x1b["))
        lines = plain.replace("\r", "").splitlines()
        assert (done.returncode, len(lines) > 15) == (0, True)
        assert max(map(len, lines)) <= 60
        assert "error" in plain


def test_in_a_pipe_no_name_is_folded(folders):
    command = [sys.executable, "-m", "svdq_hf", "inspect", str(folders / "four"), "--all"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "\x1b" not in done.stdout
    assert done.stderr == ""
    assert all(layer.name in done.stdout for layer in read_footprint(folders / "four").layers)
