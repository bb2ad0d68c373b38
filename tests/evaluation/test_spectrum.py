"""Spectra of dense, quantized and adapted models; the picture."""

import pytest
import tiny_models as tiny
import torch
from torch import nn

from svdq_hf import SVDQConfig, quantize_model
from svdq_hf.evaluation.spectrum import measure_spectra

BATCHES = [{"input_ids": tiny.tokens()}]


def test_values_are_those_of_the_weights():
    model = tiny.classifier()
    rows = measure_spectra(model)
    assert len(rows) == 13
    for row in rows:
        weight = model.get_submodule(row.name).weight.detach()
        exact = torch.linalg.svdvals(weight)
        torch.testing.assert_close(torch.tensor(row.values), exact[:10], rtol=1e-4, atol=1e-6)
        assert row.stable_rank == pytest.approx(float((exact**2).sum() / exact[0] ** 2), rel=1e-4)
        assert row.shape == tuple(weight.shape)
        assert row.pcdr is row.outlier_ratio is row.kurtosis is None


def test_a_text_shows_activations_and_a_quantized_model_is_dequantized():
    dense = tiny.classifier().eval()
    before = measure_spectra(dense, BATCHES)
    quantized = quantize_model(dense, SVDQConfig(k=32))
    after = measure_spectra(quantized, BATCHES)
    assert [one.name for one in before] == [one.name for one in after]
    for one, other in zip(before, after, strict=True):
        assert one.values != other.values
        assert other.values == pytest.approx(one.values, rel=0.2)
        assert 0 < one.pcdr[0] <= one.pcdr[1] <= one.pcdr[2] <= 1
        assert one.outlier_ratio > 1
        assert one.input_ratio > 1
        assert one.kurtosis > 1
    assert not any(module._forward_hooks for module in quantized.modules())


def test_a_model_without_linear_layers_is_refused():
    with pytest.raises(ValueError, match="Sequential has no linear layer"):
        measure_spectra(nn.Sequential(nn.LayerNorm(4)))


def test_the_picture_shows_the_layers_that_stand_out():
    pytest.importorskip("matplotlib", reason="needs the extra: pip install -e '.[evaluate]'")
    from svdq_hf.evaluation.report.drawing import svg
    from svdq_hf.evaluation.spectrum_picture import DRAWN, spectra_picture

    before = {f"layer.{number}": torch.tensor([number + 2.0, 1.5, 1.0]) for number in range(DRAWN + 2)}
    after = {name: values / 2 for name, values in before.items()}
    text = svg(spectra_picture(before, after))
    assert "before (dotted) and after" in text
    assert all(f">{number}<" in text for number in range(2, DRAWN + 2))
    assert text == svg(spectra_picture(before, after))
    assert "dotted" not in svg(spectra_picture(before))
    with pytest.raises(ValueError, match="the same before and after"):
        spectra_picture(before, {})
