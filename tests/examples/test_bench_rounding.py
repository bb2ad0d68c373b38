"""The look at single matrices: errors by hand, ours as it is stored, and which rows and layers are taken."""

import sys

import pytest
import tiny_models as tiny
import torch
from places import EXAMPLES

from svdq_hf import SVDQConfig

sys.path.insert(0, str(EXAMPLES))
import bench_quality as bq  # examples are no package
import bench_rounding as rounding
import quality_peers as peers


def test_errors_by_hand():
    def halved(weight):
        return peers.Packed(4 * weight.numel(), lambda: weight / 2)

    module = torch.nn.Linear(8, 4)
    layers = [bq.Layer(module, torch.randn(4, 8), torch.randn(16, 8)) for _ in range(2)]
    assert rounding.row(halved, layers) == pytest.approx((4.0, 250.0, 250.0))


def test_ours_is_what_would_be_stored():
    packed = rounding.by_us(SVDQConfig.small(), torch.randn(64, 128))
    assert 4.2 < packed.bits / (64 * 128) < 4.6
    assert packed.dequantize().shape == (64, 128)


def test_methods_need_no_data_and_no_other_layer():
    names = rounding.methods().keys()
    assert {"svdq default", "nf4", "trellis, window 16 (our code)"} <= names
    assert not names & {"svdq calibrated", "svdq best, synthetic", "svdq, one budget", "gptq g64"}


@pytest.mark.parametrize(("rows", "expected"), [(None, 64), (16, 16), (1000, 64)])
def test_matrices_of_chosen_layers(rows, expected, tmp_path, monkeypatch):
    model = tiny.llama()
    monkeypatch.setattr(rounding.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: model)
    monkeypatch.setattr(rounding.AutoTokenizer, "from_pretrained", lambda *_: None)
    monkeypatch.setattr(rounding, "token_ids", lambda *_: torch.arange(4, 24))
    text = tmp_path / "a.txt"
    text.write_text("a")
    found = [*rounding.matrices(tmp_path, text, [1], rows)]
    inside = [module for module in model.model.layers[1].modules() if isinstance(module, torch.nn.Linear)]
    assert [layer.module for layer in found] == inside
    assert len(found[0].weight) == expected
    assert all(layer.inputs.shape == (20, layer.weight.shape[1]) for layer in found)
