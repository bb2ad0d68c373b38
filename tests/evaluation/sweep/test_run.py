import json

import pytest
import tiny_models as tiny
import torch
from torch import nn
from transformers import BertModel, FalconConfig, FalconForCausalLM

from svdq_hf import SVDQConfig, SVDQLinear, footprint, quantize_model
from svdq_hf.evaluation.sweep import run as sweep
from svdq_hf.evaluation.sweep.plan import GRIDS, OURS, Key, SweepPlan, with_bits
from svdq_hf.evaluation.sweep.run import Sweep, overlap
from svdq_hf.evaluation.sweep.store import CELLS, OVERLAPS, append, finished

PLAN = SweepPlan(ks=(1, 30), methods=("svd", "magnitude", "awq", "spqr", "random"), seeds=2)
X = torch.arange(40).reshape(4, 10) % 90


@pytest.mark.parametrize(("method", "shared"), [("awq", True), ("pqi", False), ("relative", False)])
def test_scores_are_shared_by_grids_that_they_do_not_see(method, shared):
    grids = [name for name, choices in GRIDS.items() if choices.get("column_scale") is False][:2]
    one, other = (Key(method, grid, 8, 0, None).scoring for grid in grids)
    assert (one == other) == shared


class Outputs:
    """An evaluator that looks at the outputs of a model on one batch."""

    task = "outputs"

    def __init__(self):
        self.reference = None
        self.calls = self.passes = 0

    def __call__(self, model):
        self.calls += 1
        with torch.no_grad():
            found = model(input_ids=X).last_hidden_state
        if self.reference is None:
            self.reference = found
        loss = float((found - self.reference).square().mean())
        return {"n": 4, "right": 4, "correct": "1111", "metrics": {"accuracy": 1.0}, "loss": loss, "kl": loss}

    def calibration(self):
        self.passes += 1
        return [{"input_ids": X}]


def run(folder, plan=PLAN, evaluator=None):
    model = tiny.bert().eval()
    return Sweep(model, "tiny-seed3", evaluator or Outputs(), plan, folder).run(), model


def lines(folder, file=CELLS):
    return [json.loads(line) for line in (folder / file).read_text().splitlines()]


def without_times(cells):
    return [{key: value for key, value in cell.items() if key != "seconds"} for cell in cells]


def test_every_cell_is_run_once_baselines_first(tmp_path):
    count, _ = run(tmp_path)
    cells = lines(tmp_path)
    # FP32, two bare grids, and two grids x two k's for each method; random for two seeds
    assert count == len(cells) == 1 + 2 + 2 * 2 * (4 + 2)
    assert [cell["method"] for cell in cells[:3]] == ["fp32", "none", "none"]
    assert (cells[0]["bits_per_weight"], cells[0]["kl"], cells[0]["loss"]) == (32.0, None, 0.0)
    assert {cell["model_seed"] for cell in cells} == {3}
    assert all(cell["loss"] > 0 and len(cell["relative_error"]) == 13 for cell in cells[1:])


def test_cell_is_the_model_that_a_user_would_get(tmp_path):
    run(tmp_path)
    evaluate = Outputs()
    evaluate(tiny.bert().eval())
    for cell in lines(tmp_path):
        if cell["method"] in ("svd", "magnitude") and cell["grid"] == "group 64, mse":
            config = SVDQConfig(k=cell["k"], saliency=cell["method"], **GRIDS[OURS])
            assert evaluate(quantize_model(tiny.bert().eval(), config))["loss"] == cell["loss"]


def test_one_svd_and_one_calibration_pass_whatever_the_number_of_cells(tmp_path, monkeypatch):
    decomposed = []
    original = sweep.score_weight

    def counting(weight, config, name, inputs):
        decomposed.append(config.saliency)
        return original(weight, config, name, inputs)

    monkeypatch.setattr(sweep, "score_weight", counting)
    evaluate = Outputs()
    run(tmp_path, evaluator=evaluate)
    assert evaluate.passes == 1
    layers = 13
    assert {name: decomposed.count(name) / layers for name in set(decomposed)} == {
        "svd": 1,
        "magnitude": 1,
        "awq": 1,
        "spqr": 1,
        "random": 2,
    }


def test_relative_depends_on_the_group_and_is_scored_for_each_grid(tmp_path):
    run(tmp_path, SweepPlan(ks=(30,), methods=("relative",)))
    errors = [cell["relative_error"] for cell in lines(tmp_path) if cell["method"] == "relative"]
    assert len(errors) == 2
    assert errors[0] != errors[1]


def test_requant_has_one_budget_for_all_layers(tmp_path):
    model, batches = tiny.classifier(), [{"input_ids": X, "labels": torch.arange(4) % 3}]
    key = Key("requant", "default", 30, 0, None)
    assert key.scoring != Key("requant", "default", 31, 0, None).scoring

    class Given(Outputs):
        def calibration(self):
            return batches

        def __call__(self, model):
            return {"loss": 0.0}

    mine = Sweep(model, "tiny", Given(), SweepPlan(ks=(30,), methods=("requant",)), tmp_path)
    scores = mine._scores(key)
    config = mine._spent(key, scores)
    quantized = quantize_model(tiny.classifier(), key.config, batches)
    assert config.layer_k == {layer.name: layer.k for layer in footprint(quantized).layers}
    assert sum(config.layer_k.values()) == 30 * len(mine.layers)


def test_dense_model_is_as_it_was(tmp_path):
    _, model = run(tmp_path)
    assert not any(isinstance(module, SVDQLinear) for module in model.modules())
    assert tiny.different_tensors(model, tiny.bert()) == []


@pytest.mark.parametrize("kept", [0, 1, 3, 7, 20, 26])
def test_run_that_was_killed_goes_on_and_ends_the_same(kept, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(whole)
    killed.mkdir()
    text = (whole / CELLS).read_text().splitlines(keepends=True)
    (killed / CELLS).write_text("".join(text[:kept]) + text[kept][:50])  # cut off in the middle
    (killed / OVERLAPS).write_text('{"task": "outp')
    evaluate = Outputs()
    count, _ = run(killed, evaluator=evaluate)
    assert all(one["task"] == "outputs" for one in lines(killed, OVERLAPS))
    assert count == len(text) - kept
    # the reference is always needed; the cell "fp32" is that same run
    assert evaluate.calls == count + (kept > 0)
    assert without_times(lines(killed)) == without_times(lines(whole))


def test_finished_run_is_not_run_again(tmp_path):
    run(tmp_path)
    evaluate = Outputs()
    assert run(tmp_path, evaluator=evaluate)[0] == 0
    assert evaluate.calls == 0


def test_more_ks_are_added_to_what_is_there(tmp_path):
    run(tmp_path, SweepPlan(ks=(1,), methods=("svd",)))
    assert run(tmp_path, SweepPlan(ks=(1, 30), methods=("svd",)))[0] == 2


def test_overlaps_are_those_of_the_choices(tmp_path):
    run(tmp_path)
    found = {(one["layer"], one["k"], one["other"]): one for one in lines(tmp_path, OVERLAPS)}
    assert len(found) == 13 * 2 * 4
    model = {
        name: quantize_model(BertModel(tiny.bert_config()), SVDQConfig(k=30, saliency=name, **GRIDS[OURS]))
        for name in ("svd", "magnitude")
    }
    for name in model:
        model[name] = quantize_model(tiny.bert(), SVDQConfig(k=30, saliency=name, **GRIDS[OURS]))
    layer = "encoder.layer.1.output.dense"
    positions = [
        set(zip(part.salient_rows.tolist(), part.salient_columns.tolist(), strict=True))
        for part in (model[name].get_submodule(layer) for name in ("svd", "magnitude"))
    ]
    common = len(positions[0] & positions[1])
    one = found[layer, 30, "magnitude"]
    assert one["share"] == common / 30
    assert one["iou"] == common / (60 - common)
    assert one["chance"] == 30 / (64 * 96)


def test_ranks_are_run_for_svd_alone_and_each_is_overlapped(tmp_path):
    run(tmp_path, SweepPlan(ks=(30,), methods=("svd", "magnitude"), grids=("group 64, mse",), ranks=(1, 4)))
    assert [(cell["method"], cell["rank"]) for cell in lines(tmp_path)] == [
        ("fp32", None), ("none", None), ("svd", 1), ("svd", 4), ("magnitude", None)
    ]  # fmt: skip
    assert [one["rank"] for one in lines(tmp_path, OVERLAPS)] == [1] * 13 + [4] * 13


def test_ranks_and_ks_that_come_later_are_overlapped_too(tmp_path):
    grids = ("group 64, mse",)
    later, at_once = tmp_path / "later", tmp_path / "at once"
    for ks, ranks in (((30,), (1,)), ((30, 5), (1, 4))):
        run(later, SweepPlan(ks=ks, methods=("svd", "awq", "magnitude"), grids=grids, ranks=ranks))
    run(at_once, SweepPlan(ks=(30, 5), methods=("svd", "awq", "magnitude"), grids=grids, ranks=(1, 4)))
    found, expected = (
        {tuple(sorted(one.items())) for one in lines(folder, OVERLAPS)} for folder in (later, at_once)
    )
    assert found == expected


def test_overlap_by_hand():
    a, b = torch.tensor([0, 5, 7, 9]), torch.tensor([5, 9, 11, 12])
    assert overlap(a, b, 16) == {"iou": 2 / 6, "share": 0.5, "chance": 0.25}


def test_cells_of_other_models_do_not_count(tmp_path):
    cell = {"method": "svd", "grid": "group 64, mse", "k": 1, "score_seed": 0, "rank": 8}
    append(tmp_path / CELLS, [{**cell, "task": "outputs", "model": "other"}])
    assert finished(tmp_path, "outputs", "tiny-seed3") == set()
    assert finished(tmp_path, "outputs", "other") == {Key("svd", "group 64, mse", 1, 0, 8)}


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"methods": ("svdd",)}, "saliency='svdd': must be one of"),
        ({"grids": ("group 32",)}, "grid 'group 32': must be one of"),
        ({"ks": (-1,)}, "k=-1: must be"),
        ({"ranks": (8, 0)}, "rank=0: must be"),
    ],
)
def test_plan_refuses_what_cannot_be_run(choices, message):
    with pytest.raises(ValueError, match=message):
        SweepPlan(**choices)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_grids_of_other_bits(bits, tmp_path):
    grid = with_bits(OURS, bits)
    run(tmp_path, SweepPlan(ks=(0,), methods=("magnitude",), grids=(grid,)))
    _, none, cell = lines(tmp_path)
    assert (none["grid"], cell["grid"]) == (grid, grid)
    config = Key("magnitude", grid, 0, 0, None).config
    assert config == SVDQConfig(k=0, saliency="magnitude", **GRIDS[OURS], bits=bits)
    assert cell["bits_per_weight"] == footprint(quantize_model(tiny.bert(), config)).bits_per_weight
    assert (bits == 4) == (grid == OURS)


def test_model_without_linear_layers_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no linear layer to quantize"):
        Sweep(nn.Sequential(nn.ReLU()), "none", Outputs(), PLAN, tmp_path)


class Logits(Outputs):
    """The same of a language model."""

    def __call__(self, model):
        self.calls += 1
        with torch.no_grad():
            found = model(input_ids=X).logits
        self.reference = found if self.reference is None else self.reference
        loss = float((found - self.reference).square().mean())
        return {"n": 4, "right": None, "correct": None, "metrics": {"loss": loss}, "loss": loss}


def falcon():
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    return FalconForCausalLM(FalconConfig(**sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2)).eval()


def test_subclass_of_linear_is_quantized_as_it_is(tmp_path):
    evaluate, plan = Logits(), SweepPlan(ks=(30,), methods=("svd",), grids=(OURS,))
    Sweep(falcon(), "falcon", evaluate, plan, tmp_path).run()
    expected = quantize_model(falcon(), SVDQConfig(k=30, **GRIDS[OURS]))
    assert lines(tmp_path)[-1]["loss"] == evaluate(expected)["loss"] > 0


def test_fused_experts_stay_dense_and_it_is_said(tmp_path, caplog):
    evaluate, plan = Logits(), SweepPlan(ks=(30,), methods=("magnitude",), grids=(OURS,))
    Sweep(tiny.mixtral(), "mixtral", evaluate, plan, tmp_path).run()
    assert "fused experts stay dense in this evaluation: 2 modules, model.layers.0.mlp.experts" in caplog.text
    config = SVDQConfig(k=30, saliency="magnitude", modules_to_not_convert=["experts"], **GRIDS[OURS])
    assert lines(tmp_path)[-1]["loss"] == evaluate(quantize_model(tiny.mixtral(), config))["loss"] > 0


def test_a_contestant_that_the_model_cannot_be_is_refused_before_the_model_is_run(tmp_path):
    plan = SweepPlan(methods=(), contestants={"own": SVDQConfig.self_calibrated()})
    evaluator = Outputs()
    with pytest.raises(ValueError, match="only a causal model with its head has"):
        run(tmp_path, plan, evaluator)
    assert evaluator.calls == 0
