"""The quality bench: what a cell says, what is run again, and the peers that happen to be installed."""

import json
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import tiny_models as tiny
import torch
from places import EXAMPLES
from transformers import AutoTokenizer

from svdq_hf import SVDQConfig, footprint, quantize_model
from svdq_hf.calibration.inputs import InputStatistics
from svdq_hf.demo import default_model
from svdq_hf.evaluation.comparison.answers import Reference
from svdq_hf.evaluation.comparison.windows import CausalWindows

sys.path.insert(0, str(EXAMPLES))
import bench_quality as bq  # examples are no package
import quality_peers as peers
import quality_tasks as tasks

KL_FLOOR = 1e-5
"""What half-precision log-probabilities leave: spacing 2**-8 at -5, so about (2**-9)**2 / 2 = 2e-6."""


class Letters:
    """A tokenizer: one token per character."""

    bos_token_id: int | None = 1

    def __call__(self, text, **_):
        return {"input_ids": torch.tensor([[4 + ord(letter) % 90 for letter in text]])}


class Exact:
    """A peer that loses nothing."""

    missing = staticmethod(lambda: None)
    data = False

    @staticmethod
    def quantize(weight, inputs):
        assert inputs is None
        return peers.Packed(32 * weight.numel(), lambda: weight)


class Broken(Exact):
    @staticmethod
    def quantize(weight, inputs):
        weight.zero_()
        raise RuntimeError("needs another machine")


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "letters.txt"
    file.write_text("the quick brown fox jumps over the lazy dog. " * 4)
    return file


@pytest.fixture
def task(text):
    return tasks.TextTask(text, Letters(), context=16, tokens=40, held=40)


@pytest.fixture
def bench(task, tmp_path, monkeypatch):
    monkeypatch.setattr(bq, "PEERS", {"nf4": Exact, "broken": Broken, "awq": awq(32)})
    return bq.Bench(tiny.FAMILIES["llama-untied"].loud_model(), "tiny", task, tmp_path / "out")


def awq(group):
    return peers.Peer((), partial(peers.awq, group=group), data=True)


def cells(bench):
    return {cell["method"]: cell for cell in bq.read(bench.out)}


def lines(bench):
    return (bench.out / "quality.jsonl").read_text().splitlines()


# Tasks.


@pytest.mark.parametrize(("first", "n"), [(1, 40), (None, 40 - 3)])
def test_text_scores_each_token_once(text, first, n, monkeypatch):
    monkeypatch.setattr(Letters, "bos_token_id", first)
    task = tasks.TextTask(text, Letters(), context=16, tokens=40, held=40)
    model, total = tiny.llama(), 0.0
    with torch.no_grad():
        for window in task.windows:
            assert window.numel() <= 16
            total += float(model(input_ids=window, labels=window).loss) * (window.numel() - 1)
        found = task(model)
        assert found["n"] == n
        assert found["loss"] == pytest.approx(total / n, rel=1e-5)
        again = task(model)
        assert abs(again["kl"]) < KL_FLOOR
        assert again["metrics"] == {"same": 1.0}
        assert again["interval"] == [0.0, 0.0]


def test_figures_are_those_of_svdq_compare(task, tmp_path):
    ids = torch.cat([window[0, 1:] for window in task.windows])
    measure = CausalWindows(ids, 16, Letters.bos_token_id, Reference(tmp_path))
    dense, other = tiny.FAMILIES["llama-untied"].loud_model(), tiny.llama()
    with torch.no_grad():
        theirs = [task(model) for model in (dense, other)]
    ours = [measure(model) for model in (dense, other)]
    for one, two in zip(theirs, ours, strict=True):
        assert two.n == one["n"]
        assert float(two.loss.mean()) == pytest.approx(one["loss"], rel=1e-6)
        assert float(two.kl.mean()) == pytest.approx(one["kl"], rel=1e-9)
        assert float(two.same.double().mean()) == one["metrics"]["same"]
    change = theirs[1]["loss"] - theirs[0]["loss"]
    assert theirs[1]["interval"] == pytest.approx([change] * 2)  # 40 tokens are one block


def test_calibration_is_not_what_is_scored(text):
    text.write_text("a" * 40 + "b" * 40)
    task = tasks.TextTask(text, Letters(), context=16, tokens=40, held=40)
    scored, held = ({int(i) for batch in part for i in batch[0, 1:]} for part in (task.windows, task.held))
    assert not scored & held
    with pytest.raises(ValueError, match="80 tokens, fewer than 41 to score and 40 to hold"):
        tasks.TextTask(text, Letters(), context=16, tokens=41, held=40)


def test_glue_task(tmp_path):
    (tmp_path / "mnli").mkdir()
    rows = [
        json.dumps({"premise": f"it is {n}", "hypothesis": "it is " * n, "label": n % 3}) for n in range(6)
    ]
    for split in ("train", "dev"):
        (tmp_path / "mnli" / f"{split}.jsonl").write_text("\n".join(rows))
    tokenizer = AutoTokenizer.from_pretrained(default_model())
    task = tasks.GlueTask("mnli", tokenizer, str(tmp_path), held=128)
    bench = bq.Bench(tiny.classifier(vocab_size=30522), "tiny", task, tmp_path)
    bench.run(["svdq default", "awq g64 (our code)"])  # the second does not fit a width of 96
    found = cells(bench)["svdq default"]
    assert found["n"] == 6
    assert found["kl"] > 0
    assert found["metrics"]["accuracy"] == found["right"] / 6
    assert [batch["input_ids"].shape[0] for batch in task.calibration()] == [2]
    assert "accuracy" in bq.table(bq.read(tmp_path))


# Cells.


def test_cell_of_ours_is_the_real_quantized_model(bench, task):
    bench.run(["svdq default"])
    found = cells(bench)["svdq default"]
    model = quantize_model(tiny.FAMILIES["llama-untied"].loud_model(), SVDQConfig())
    with torch.no_grad():
        real = task(model)
    assert found["loss"] == pytest.approx(real["loss"], abs=1e-5)
    assert found["kl"] == pytest.approx(real["kl"], rel=1e-3)
    assert found["kl"] > 10 * KL_FLOOR
    assert found["change"] == pytest.approx(real["loss"] - cells(bench)["fp32"]["loss"], abs=1e-5)
    assert found["bits"] == pytest.approx(footprint(model).bits_per_weight)
    assert 0 < found["output_error"] < 0.2
    assert found["seconds"] > 0
    assert found["config"]["k"] == 256


def test_peers_leave_the_model_as_it_was(bench, capsys):
    before = {name: tensor.clone() for name, tensor in bench.model.state_dict().items()}
    bench.run(["broken", "nf4", "awq"])
    after = bench.model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert "broken: does not run here: RuntimeError: needs another machine" in capsys.readouterr().out
    found = cells(bench)
    assert found.keys() == {"fp32", "nf4", "awq"}
    assert found["nf4"]["bits"] == 32
    assert found["nf4"]["change"] == found["nf4"]["output_error"] == 0
    assert abs(found["nf4"]["kl"]) < KL_FLOOR
    assert found["awq"]["kl"] > 10 * KL_FLOOR


def test_finished_cells_are_not_run_again(bench):
    bench.run(["nf4"])
    first = lines(bench)
    bench.run(["nf4"])
    assert lines(bench) == first
    bench.run(["nf4", "svdq k=0"])
    assert len(lines(bench)) == 3
    bench.run(["nf4"], again=True)
    assert len(lines(bench)) == 4
    assert len(bq.read(bench.out)) == 3


def test_a_peer_that_forgets_a_layer_has_no_cell(bench, monkeypatch, capsys):
    forget = staticmethod(lambda layers: iter(list(layers)[:-1]))
    whole = bq.Bench._peer_layers
    monkeypatch.setattr(bq.Bench, "_peer_layers", lambda self, peer: forget(whole(self, peer)))
    bench.run(["nf4"])
    assert (
        "ValueError: other layers were quantized: ['model.layers.1.mlp.down_proj']" in capsys.readouterr().out
    )
    assert cells(bench).keys() == {"fp32"}


def test_transposed_layers(tmp_path, task, monkeypatch):
    monkeypatch.setattr(bq, "PEERS", {"nf4": Exact})
    bench = bq.Bench(tiny.FAMILIES["gpt2"].loud_model(), "gpt2", task, tmp_path)
    bench.run(["nf4", "svdq default"])
    assert abs(cells(bench)["nf4"]["kl"]) < KL_FLOOR
    assert cells(bench)["svdq default"]["output_error"] < 0.2


def test_table():
    about = {"model": "m", "text": "t", "n": 8, "metrics": {"accuracy": 0.5}}
    rows = [
        {**about, "method": "fp32", "bits": 32.0, "loss": 2.0, "change": 0.0, "kl": 0.0},
        {**about, "method": "nf4", "bits": 4.5, "loss": 2.2, "change": 0.2, "kl": 0.4, "seconds": 3.0},
        {
            **about,
            "method": "ours",
            "bits": 4.25,
            "loss": 2.1,
            "change": 0.1,
            "kl": 0.1,
            "interval": [0.08, 0.12],
            "output_error": 0.05,
        },
    ]
    title, _, _, _, *entries = bq.table(rows).splitlines()
    assert title == "### m: t (n = 8, FP32 loss 2.0000)"
    assert [line.split(" | ")[0] for line in entries] == ["| fp32", "| ours", "| nf4"]
    assert (
        entries[1]
        == "| ours | 4.250 | +0.1000 | +0.0800 to +0.1200 | 0.50 | 0.100 | 0.25 | 0.5000 | 0.0500 | - |"
    )
    assert entries[2] == "| nf4 | 4.500 | +0.2000 | - | 1.00 | 0.400 | 1.00 | 0.5000 | - | 3.0 |"
    assert bq.table(rows[:1] + rows[2:]).splitlines()[5].count("| - |") == 3


@pytest.mark.parametrize(
    "arguments", [[], ["--model", "m"], ["--model", "m", "--text", "t", "--task", "rte"], ["--speech", "s"]]
)
def test_command_line_wants_a_model_and_one_text(arguments, tmp_path, capsys):
    with pytest.raises(SystemExit):
        bq.main([str(tmp_path), *arguments])
    assert "give --model and one of --text, --speech and --task; or --table" in capsys.readouterr().err


def test_command_line_prints_the_table(bench, capsys):
    bench.run(["nf4"])
    capsys.readouterr()
    bq.main([str(bench.out), "--table"])
    assert capsys.readouterr().out == bq.table(bq.read(bench.out)) + "\n"


def test_every_method_of_ours_makes_a_config():
    assert all(isinstance(make(), SVDQConfig) for make in bq.OURS.values())
    assert not bq.OURS.keys() & bq.PEERS.keys()


# Peers.


def statistics(inputs):
    seen = InputStatistics()
    seen.add(inputs, with_gram=True)
    return seen


def test_awq_beats_plain_rounding_where_inputs_differ():
    weight, inputs = torch.randn(64, 128), torch.randn(500, 128)
    inputs[:, ::32] *= 20  # a few inputs that matter
    found = peers.awq(weight, statistics(inputs), group=64)
    assert found.bits == 64 * 128 * 4 + 64 * 2 * 20 + 128 * 16
    plain = peers.rtn(weight, 64)[1]
    assert (inputs @ (plain - weight).T).norm() > 1.5 * (inputs @ (found.dequantize() - weight).T).norm()
    with pytest.raises(ValueError, match="needs the Gram matrix"):
        peers.awq(weight, None, group=64)


def test_stored_bits_counts_tensors_however_deep():
    part = torch.zeros(3, dtype=torch.uint8)
    assert peers.stored_bits(part, {"a": [part, "text", 7, None]}, torch.Size([4])) == 48


def test_a_package_that_is_not_there_says_so():
    peer = peers.Peer(("json", "no_such_package"), SimpleNamespace())
    assert peer.missing() == "ModuleNotFoundError: No module named 'no_such_package'"
    assert peers.Peer(("json",), SimpleNamespace()).missing() is None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", peers.PEERS)
def test_peer_rounds_to_four_bits(name):
    peer = peers.PEERS[name]
    reason = peer.missing()
    if reason is not None:
        pytest.skip(reason)
    weight, inputs = torch.randn(64, 256) / 16, torch.randn(600, 256)
    kept = weight.clone()
    packed = peer.quantize(weight, statistics(inputs) if peer.data else None)
    found = packed.dequantize()
    assert torch.equal(weight, kept)
    assert found.shape == weight.shape
    # uniform 4 bits on a normal weight: step = 5 sigma / 15, error = step / sqrt(12) = 0.096 sigma
    bits = packed.bits / weight.numel()
    assert (found.float() - weight).norm() / weight.norm() < (0.13 if bits > 4 else 0.26)
    assert 3.4 < bits < 5.1
