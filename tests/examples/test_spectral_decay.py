"""`examples/spectral_decay.py`: rounding by hand, and a whole run and its table on a tiny model."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import tiny_models as tiny
import torch
from places import EXAMPLES
from transformers import BertTokenizerFast, LlamaForCausalLM


def load():
    spec = importlib.util.spec_from_file_location("spectral_decay_example", EXAMPLES / "spectral_decay.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_absmax_rounds_each_row_to_its_own_grid():
    rows = torch.tensor([[7.0, 3.4, -6.6], [0.7, 0.0, 0.06]])
    torch.testing.assert_close(load().rounded(rows, 4), torch.tensor([[7.0, 3.0, -7.0], [0.7, 0.0, 0.1]]))


def test_weights_and_inputs_are_rounded_in_a_copy():
    module, model = load(), tiny.classifier().eval()
    with torch.no_grad():
        plain = model(tiny.tokens()).logits
        coarse = module.with_absmax(model, 3)(tiny.tokens()).logits
        fine = module.with_absmax(model, 12)(tiny.tokens()).logits
        assert torch.equal(model(tiny.tokens()).logits, plain)
    assert (fine - plain).norm() < 0.1 * (coarse - plain).norm()


@pytest.mark.slow
def test_a_run_is_scored_once_and_tabled(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "it", "rains", "again", "and", "snows"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    LlamaForCausalLM(tiny.llama_config(max_position_embeddings=512)).save_pretrained(tmp_path / "model")
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("it rains and snows and rains again " * 200)
    example = str(EXAMPLES / "spectral_decay.py")
    choices = ["--model", "model", "--text", "text.txt", "--steps", "2", "--scored", "600"]
    for _ in range(2):
        subprocess.run(
            [sys.executable, example, "run", "text", "out.jsonl", "--ways", "s2d", "--seeds", "0", *choices],
            cwd=tmp_path,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
            check=True,
            capture_output=True,
        )
    (line,) = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert line["scores"].keys() == load().QUANTIZED.keys()
    assert all(scored["score"] > 1 for scored in line["scores"].values())
    assert line["decompositions"] == 1
    assert len(line["before"]) == len(line["after"]) == 14
    printed = subprocess.run(
        [sys.executable, example, "table", "out.jsonl"],
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert f"| text | s2d | 1 | {line['scores']['fp32']['score']:.3f} |" in printed
