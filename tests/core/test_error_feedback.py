import pytest
import tiny_models as tiny
import torch
from torch import nn

from svdq_hf import SVDQConfig, quantize_model
from svdq_hf.core.error_feedback import quantize_with_feedback
from svdq_hf.core.grid import Grid
from svdq_hf.core.rounding import quantize
from svdq_hf.format.checks import check_parts
from svdq_hf.format.decode import reconstruct
from svdq_hf.format.encode import decompose
from svdq_hf.format.parts import Scheme

GRIDS = [
    Grid(32),
    Grid(16, levels="normal"),
    Grid(32, levels="normal", column_scale=True, scale_bits=8),
    Grid(32, levels="normal", column_scale=True, scale_bits=8, bits=3),
    Grid(32, bits=8),
]
every_grid = pytest.mark.parametrize("grid", GRIDS, ids=str)
NONE = torch.empty(0, dtype=torch.int32)


def inputs(tokens=400, columns=96):
    """Inputs that hang together: a few directions, and noise."""
    return torch.randn(tokens, 6) @ torch.randn(6, columns) + 0.3 * torch.randn(tokens, columns)


@every_grid
def test_outputs_are_nearer_than_without(grid):
    weight, x = torch.randn(40, 96), inputs()
    scheme = Scheme(0, grid)
    lost = []
    for gram in (None, x.T @ x):
        parts = decompose(weight, NONE, NONE, scheme, gram=gram)
        check_parts(parts, 96, scheme)
        lost.append(float((x @ (weight - reconstruct(parts, 96, scheme)).T).square().sum()))
    # inputs of six directions leave 90 columns to make an error good
    assert lost[1] < 0.25 * lost[0]


@every_grid
def test_inputs_that_have_nothing_in_common_give_no_feedback(grid):
    weight = torch.randn(40, 96)
    kept = torch.zeros(40, 96, dtype=torch.bool)
    found = quantize_with_feedback(weight, grid, 3.0 * torch.eye(96), kept)
    plain = quantize(weight, grid)
    if not grid.row_scale:  # of those, the row's factor leaves room for feedback
        assert torch.equal(found.scale, plain.scale)
        assert torch.equal(found.codes, plain.codes)
    assert (found.codes != plain.codes).float().mean() < 0.1


@every_grid
def test_kept_weights_are_kept_and_their_neighbours_know(grid):
    weight, x = torch.randn(40, 96), inputs()
    rows = torch.arange(40, dtype=torch.int32)
    columns = (rows * 7) % 96
    scheme = Scheme(40, grid)
    parts = decompose(weight, rows, columns, scheme, gram=x.T @ x)
    check_parts(parts, 96, scheme)
    dense = reconstruct(parts, 96, scheme)
    assert torch.equal(dense[rows.long(), columns.long()], weight[rows.long(), columns.long()])


def test_input_that_was_always_zero():
    weight, x = torch.randn(8, 96), inputs()
    x[:, 5] = 0
    for gram in (x.T @ x, torch.zeros(96, 96)):
        parts = decompose(weight, NONE, NONE, Scheme(0, GRIDS[2]), gram=gram)
        check_parts(parts, 96, Scheme(0, GRIDS[2]))
        assert torch.isfinite(reconstruct(parts, 96, Scheme(0, GRIDS[2]))).all()


def test_by_hand():
    # Two inputs that are always equal: what the first column loses, the second makes good. Codes are
    # whole numbers here (scale 1: the largest, 7, over 7).
    weight = torch.tensor([[0.4] + [0.3] + [0.0] * 29 + [7.0]])
    x = torch.zeros(1, 32)
    x[0, :2] = 1.0
    gram = x.T @ x + 1e-4 * torch.eye(32)
    kept = torch.zeros(1, 32, dtype=torch.bool)
    found = quantize_with_feedback(weight, Grid(32, "absmax"), gram, kept)
    assert float(found.scale) == 1.0
    # 0.4 is rounded to 0; the second, then almost 0.7, to 1: together 1 instead of 0 (0.7 asked)
    assert found.codes[0, [0, 1, 31]].tolist() == [0, 1, 7]
    assert quantize(weight, Grid(32, "absmax")).codes[0, [0, 1, 31]].tolist() == [0, 0, 7]


@pytest.mark.parametrize("size", ["row", "tensor"])
def test_scales_of_more_than_a_group_are_refused(size):
    with pytest.raises(ValueError, match=f"error feedback needs scales of groups, not group_size='{size}'"):
        decompose(torch.randn(8, 96), NONE, NONE, Scheme(0, Grid(size)), gram=torch.eye(96))


def test_calibrated_models_are_nearer_than_data_free_ones_of_the_same_size(tmp_path):
    batches = [{"input_ids": torch.randint(90, (8, 16))} for _ in range(4)]
    x = torch.randint(90, (16, 16))
    lost = []
    for config, data in ((SVDQConfig.calibrated(), batches), (SVDQConfig(k=0.0005, group_size=64), None)):
        with torch.no_grad():
            dense = tiny.bert().eval()(input_ids=x).last_hidden_state
            model = quantize_model(tiny.bert().eval(), config, data)
            lost.append(float((model(input_ids=x).last_hidden_state - dense).square().mean()))
            model.save_pretrained(tmp_path / config.saliency)
            again = type(model).from_pretrained(tmp_path / config.saliency)
            assert tiny.different_tensors(again, model) == []
    assert lost[0] < lost[1]


@pytest.mark.parametrize("bits", [3, 8])
def test_models_of_other_bits_are_nearer_too_and_come_back(bits, tmp_path):
    batches = [{"input_ids": torch.randint(90, (8, 16))} for _ in range(4)]
    x = torch.randint(90, (16, 16))
    lost = []
    for feedback in (True, False):
        config = SVDQConfig(k=16, bits=bits, error_feedback=feedback, scale_bits=16)
        with torch.no_grad():
            dense = tiny.bert().eval()(input_ids=x).last_hidden_state
            model = quantize_model(tiny.bert().eval(), config, batches if feedback else None)
            lost.append(float((model(input_ids=x).last_hidden_state - dense).square().mean()))
        model.save_pretrained(tmp_path / str(feedback))
        again = type(model).from_pretrained(tmp_path / str(feedback))
        assert tiny.different_tensors(again, model) == []
    assert lost[0] < lost[1]


def test_without_data_it_is_refused_and_says_how():
    with pytest.raises(ValueError, match=r"error_feedback needs \['input_gram'\], which only data can give"):
        quantize_model(nn.Sequential(nn.Linear(64, 64)), SVDQConfig(error_feedback=True))
