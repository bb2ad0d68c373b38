"""Peaks of layers: which outputs are kept, padding left out, hooks taken off again."""

import pytest
import torch
from torch import nn

from svdq_hf.training.peaks import MOST_TOKENS, PeakRecorder, Peaks


def test_the_largest_outputs_are_kept_with_what_made_them():
    x, weight = (
        torch.randn(50, 3, generator=torch.Generator().manual_seed(0)),
        torch.tensor([[1.0, 0, 0], [0, 2, 0]]),
    )
    found = Peaks.of(x, x @ weight.T)
    assert len(found.outputs) == MOST_TOKENS
    torch.testing.assert_close((found.inputs * weight[found.units]).sum(1), found.outputs)
    assert found.outputs[0].abs() == (x @ weight.T).abs().max()


def test_two_passes_are_as_one():
    x, y = (torch.randn(60, 4, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    joined = Peaks.of(x[:20], y[:20]).joined(Peaks.of(x[20:], y[20:]))
    torch.testing.assert_close(joined.outputs, Peaks.of(x, y).outputs)
    torch.testing.assert_close(joined.inputs, Peaks.of(x, y).inputs)


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x, attention_mask=None):
        return self.layer(x)


def test_padding_is_left_out():
    model, x = Masked(), torch.ones(1, 4, 3)
    x[0, 3] = 1000.0
    recorder = PeakRecorder(model, {"layer": model.layer}, training=False)
    recorder.watch()
    model(x, attention_mask=torch.tensor([[1, 1, 1, 0]]))
    assert recorder.peaks["layer"].inputs.max() == 1


def test_an_evaluation_in_training_is_not_recorded_and_hooks_come_off():
    model = Masked()
    recorder = PeakRecorder(model, {"layer": model.layer}, training=True)
    recorder.watch()
    with torch.no_grad():
        model(torch.ones(1, 4, 3))
    assert recorder.peaks == {}
    model(torch.ones(1, 4, 3))
    assert recorder.peaks["layer"].outlier_ratio >= 1
    recorder.stop()
    assert not model._forward_pre_hooks
    assert not model.layer._forward_hooks


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes_are_widened(dtype):
    found = Peaks.of(torch.ones(2, 3, dtype=dtype), torch.ones(2, 2, dtype=dtype))
    assert found.inputs.dtype == found.outputs.dtype == torch.float32
