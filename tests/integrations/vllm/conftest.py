"""The plugin on vLLM's own layers where it is installed, on those of `vllm_stand_in` elsewhere."""

import sys
from types import SimpleNamespace

import pytest
import vllm_stand_in
from tiny_models import llama

from svdq_hf import SVDQConfig, quantize_model
from svdq_hf.nn.inventory import svdq_layers

PACKAGE = "svdq_hf.integrations.vllm"
IMPORTING = [f"{PACKAGE}.{name}" for name in ("quantization_config", "linear_method", "vocabulary")]
"""The modules that import vLLM."""


@pytest.fixture(scope="module")
def plugin():
    """What the plugin's modules have, registered with vLLM."""
    with pytest.MonkeyPatch.context() as patch:
        vllm_stand_in.install(patch)
        for name in IMPORTING:
            patch.delitem(sys.modules, name, raising=False)
        from svdq_hf.integrations.vllm.plugin import register

        register()
        register()  # vLLM may load plugins more than once
        found = {key: value for name in IMPORTING for key, value in vars(sys.modules[name]).items()}
        yield SimpleNamespace(register=register, **{key: found[key] for key in found if key[0] != "_"})
        for name in IMPORTING:
            sys.modules.pop(name, None)


CHOICES = {
    "default": {"k": 32},
    "one column scale": {"k": 32, "column_scale": False},
    "8 bits": {"k": 0.01, "bits": 8},
    "3 bits": {"k": 32, "bits": 3},
}


@pytest.fixture(scope="module", params=CHOICES.values(), ids=CHOICES)
def checkpoint(request, tmp_path_factory):
    """The folder of a quantized model, and the dense matrices of its layers."""
    folder = tmp_path_factory.mktemp("quantized")
    model = quantize_model(llama(), SVDQConfig(**request.param))
    model.save_pretrained(folder)
    return folder, {name: layer.dequantize() for name, layer in svdq_layers(model)}
