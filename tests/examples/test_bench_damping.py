"""Damping from the data: what shrinkage estimates, and the table of a model that is made up here."""

import math
import sys

import pytest
import tiny_models as tiny
import torch
from places import EXAMPLES

from svdq_hf.calibration.inputs import InputStatistics

sys.path.insert(0, str(EXAMPLES))
import bench_damping as bench  # examples are no package


def seen(inputs: torch.Tensor) -> bench.Seen:
    statistics = InputStatistics()
    statistics.add(inputs, with_gram=True)
    fourth = float(inputs.double().square().sum(1).square().sum())
    return bench.Seen(statistics, fourth, torch.ones(inputs.shape[1]))


@pytest.mark.parametrize("tokens", [32, 128, 4096])
def test_shrinkage_is_that_of_ledoit_and_wolf(tokens):
    """Their formula as it is written, with the sum over tokens."""
    inputs = torch.randn(tokens, 16, dtype=torch.float64) * torch.linspace(1, 3, 16)
    second = inputs.T @ inputs / tokens
    mean = second.diagonal().mean()
    noise = sum(float((torch.outer(x, x) - second).square().sum()) for x in inputs) / tokens**2
    share = min(noise / float((second - mean * torch.eye(16)).square().sum()), 0.99)
    found = bench.shrinkage(seen(inputs.float()))
    assert found == pytest.approx(share / (1 - share), rel=1e-3)


def test_the_more_tokens_the_less_damping():
    inputs = torch.randn(4096, 16) * torch.linspace(1, 3, 16)
    few, many = (bench.shrinkage(seen(inputs[:tokens])) for tokens in (64, 4096))
    assert 0 < 20 * many < few


def test_lengths_are_those_of_inputs_in_the_weights_own_scale():
    layer, inputs = torch.nn.Linear(16, 8), torch.randn(3, 5, 16)
    layer.weight.data *= torch.linspace(1, 9, 16)
    found = bench.what_layers_see(layer, {"": layer}, [inputs])[""]
    lengths = (inputs * found.scale).square().sum(-1)
    assert found.fourth == pytest.approx(float(lengths.square().sum()), rel=1e-5)
    assert found.scale.max() > 3 * found.scale.min()


def test_error_is_that_of_the_outputs():
    weight, rounded, inputs = torch.randn(4, 8), torch.randn(4, 8), torch.randn(32, 8)
    expected = float((inputs @ (rounded - weight).T).norm() / (inputs @ weight.T).norm())
    assert bench.error(weight, rounded, inputs.T @ inputs) == pytest.approx(expected, rel=1e-4)


def test_blocks_are_spread_over_the_model():
    names = bench.some_layers(tiny.llama(num_hidden_layers=6), 2)
    assert {bench.block_of(name) for name in names} == {1, 4}
    assert not any("lm_head" in name for name in names)


def test_the_table_has_a_row_for_each_source(tmp_path, monkeypatch, capsys):
    tiny.llama().save_pretrained(tmp_path)
    monkeypatch.setattr(bench.AutoTokenizer, "from_pretrained", lambda folder: None)
    ids = torch.randint(0, 64, (400,))
    monkeypatch.setattr(bench, "token_ids", lambda text, tokenizer: ids)
    monkeypatch.setattr(bench, "HELD", 128)
    monkeypatch.setattr(bench, "synthetic_batches", lambda model: bench.windows(ids[200:264]))
    (tmp_path / "text.txt").write_text("words")
    command = ["x", str(tmp_path), "--text", str(tmp_path / "text.txt"), "--tokens", "64", "--layers", "1"]
    monkeypatch.setattr(sys, "argv", command)
    bench.main()
    title, _, *rows = capsys.readouterr().out.splitlines()
    assert title == "| seen | 0 | 0.1 | 0.3 | 1 | 3 | shrinkage |"
    cells = [[part.strip() for part in row.strip("|").split("|")] for row in rows]
    assert [row[0] for row in cells] == ["synthetic", "64 tokens"]
    assert all(0.3 < float(one) < 3 and math.isfinite(float(one)) for row in cells for one in row[1:])
