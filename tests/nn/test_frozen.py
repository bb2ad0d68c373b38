"""Packed bytes do not train: a loop that unfreezes a block is told what does, whatever became of the model."""

import copy
import pickle

import pytest
import tiny_experts
import tiny_models as tiny
import torch

from svdq_hf import SVDQConfig, mark_trainable, quantize_model

CONFIG = SVDQConfig(k=8)
WAYS = {
    "quantized": lambda model, folder: model,
    "copied": lambda model, folder: copy.deepcopy(model),
    "pickled": lambda model, folder: pickle.loads(pickle.dumps(model)),
    "loaded": lambda model, folder: reloaded(model, folder),
    "cast": lambda model, folder: model.to(torch.bfloat16),
}


def reloaded(model, folder):
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "build", [tiny.llama, lambda: tiny_experts.build("mixtral")], ids=["layers", "experts"]
)
def test_a_loop_that_unfreezes_packed_bytes_is_told_what_trains(build, way, tmp_path):
    model = WAYS[way](quantize_model(build(), CONFIG), tmp_path).requires_grad_(False)
    with pytest.raises(ValueError, match=r"bytes, which cannot train: mark_trainable\(model\)"):
        for parameter in model.model.layers[-1].parameters():
            parameter.requires_grad_(True)
    for parameter in model.model.layers[-1].parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert any(name.endswith("salient_values") for name in trained)
    assert all("layers.1." in name for name in trained)


def test_a_whole_model_is_marked_by_mark_trainable():
    model = quantize_model(tiny.llama(), CONFIG)
    with pytest.raises(ValueError, match="mark_trainable"):
        model.requires_grad_(True)
    assert mark_trainable(model, show=False).counts["salient"] > 0
