"""`bench_linear.py`, `bench_loading.py`, `bench_generate.py` and `bench_grid.py`, on small models."""

import importlib.util
import json
import re
import sys

import pytest
import tiny_models as tiny
import torch
from places import EXAMPLES


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickles look modules up by name
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def linear(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    module = load("bench_linear")
    for name, value in {"ROUNDS": 1, "SECONDS": 0.0, "BEYOND_CACHE": 1 << 16}.items():
        monkeypatch.setattr(module, name, value)
    return module


def ratios(line):
    return [float(cell) for cell in line.strip("| ").split(" | ")[1:]]


def test_bench_linear_prints_what_it_checked_and_a_ratio_for_each_layer(linear, monkeypatch, capsys):
    names = ["dense fp32", "svdq", "svdq k=0", "dense bf16"]
    monkeypatch.setattr(
        sys, "argv", ["x", "96x128", "--tokens", "1", "20", "--only", *names, "--cpu", "plain"]
    )
    linear.main()
    machine, errors, *rows = capsys.readouterr().out.splitlines()
    assert machine.endswith("path plain")
    found = [float(number) for number in re.findall(r"(?:svdq|dense) (\S+?)[,;]?(?= |$)", errors)]
    assert len(found) == 4
    assert max(found) < 1e-6
    assert rows[0] == "| 96x128, warm | 1 tokens | 20 tokens |"
    assert [row.strip("| ").split(" | ")[0] for row in rows[2:]] == ["dense fp32, ms", *names[1:]]
    assert all(len(ratios(row)) == 2 and min(ratios(row)) > 0 for row in rows[2:])


def test_bench_linear_goes_through_copies_where_a_cache_must_not_help(linear):
    weight = torch.randn(96, 128)
    layers = linear.copies(linear.CONTENDERS["dense fp32"].make(weight, torch.float32), weight)
    assert len(layers) == 1 + (1 << 16) // (96 * 128 * 4)
    assert len({layer.weight.data_ptr() for layer in layers}) == len(layers)


def test_bench_linear_ends_its_busy_processes(linear, monkeypatch):
    started = []
    popen = linear.subprocess.Popen
    monkeypatch.setattr(
        linear.subprocess, "Popen", lambda command: started.append(popen(command)) or started[-1]
    )
    with linear.busy_processes(2):
        assert [process.poll() for process in started] == [None, None]
    assert all(process.poll() is not None for process in started)


def test_bench_linear_does_not_time_a_wrong_layer(linear):
    weight = torch.randn(96, 128)
    with pytest.raises(ValueError, match="svdq is wrong by"):
        linear.check("svdq", lambda x: x @ weight.T * 1.5, weight)


@pytest.mark.slow
def test_bench_generate_measures_each_variant_in_a_process_of_its_own(tmp_path, monkeypatch, capsys):
    generate = load("bench_generate")
    tiny.llama(vocab_size=1000, max_position_embeddings=600).save_pretrained(tmp_path)
    only = ["--only", "svdq, head", "bitsandbytes nf4, bf16", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["x", "--model", str(tmp_path), *only])
    generate.main()
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split(" | ")[0].strip("| "): line for line in lines if line.startswith("|")}
    assert "(1.00x)" in rows["fp32"]
    stored = {name: float(rows[name].strip("| ").split(" | ")[-1]) for name in ("fp32", "svdq, head")}
    assert stored["svdq, head"] <= stored["fp32"]
    if importlib.util.find_spec("bitsandbytes") is None:
        assert any(line.startswith("bitsandbytes nf4, bf16: not here (ImportError") for line in lines)


def test_bench_grid_knows_where_its_seconds_went(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    from svdq_hf.evaluation.sweep.plan import SweepPlan

    class Evaluator:
        task = "rte"

        def __call__(self, model):
            logits = model(tiny.tokens()).logits
            return {
                "n": 2,
                "right": 1,
                "correct": "10",
                "majority": 1,
                "metrics": {},
                "loss": float(logits.detach().sum()),
            }

        def calibration(self):
            return []

    plan = SweepPlan(ks=[4], methods=["svd", "magnitude"], grids=["default"], seeds=1, ranks=[2])
    run = load("bench_grid").TimedRun(tiny.classifier(), "m", Evaluator(), plan, tmp_path)
    assert run.run() == len(list(plan.cells()))
    seconds = run.seconds
    assert 0 < seconds["forward"] < seconds["all"]
    assert 0 < seconds["quantize"] < seconds["all"]
    assert seconds["forward"] + seconds["quantize"] <= seconds["all"]


def test_bench_loading_loads_each_way_and_divides_by_nf4(tmp_path, monkeypatch, capsys):
    loading = load("bench_loading")
    tiny.llama().save_pretrained(tmp_path)
    loading.load(str(tmp_path), "float32", "SVDQConfig()")
    seconds = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(seconds) == 2
    assert min(seconds) > 0

    times = {"dense": 1.0, loading.NF4: 2.0}
    monkeypatch.setattr(loading, "measured", lambda folder, dtype, way: [times.get(way, 3.0), 4.0])
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(sys, "argv", ["x", str(tmp_path), "--rounds", "1"])
    loading.main()
    rows = capsys.readouterr().out.splitlines()
    assert "| dense | 1.00 | 4.00 | 0.50, 1.00 |" in rows
    assert "| SVDQConfig() | 3.00 | 4.00 | 1.50, 1.00 |" in rows
