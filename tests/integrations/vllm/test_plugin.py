"""The plugin registers with vLLM, and says with which releases it was tried where it cannot."""

import sys

import pytest
import vllm_stand_in
from places import ROOT
from vllm_layers import LAYERS

from svdq_hf import SVDQConfig


def methods():
    quantization = sys.modules[f"{LAYERS}.quantization"]
    return quantization._CUSTOMIZED_METHOD_TO_QUANT_CONFIG if vllm_stand_in.REAL else vllm_stand_in._methods


def test_vllm_finds_the_method_by_the_name_in_config_json(plugin):
    assert methods()["svdq"] is plugin.SVDQVllmConfig
    assert plugin.SVDQVllmConfig(SVDQConfig()).get_name() == "svdq"
    declared = (ROOT / "pyproject.toml").read_text()
    assert (
        '[project.entry-points."vllm.general_plugins"]\nsvdq = "svdq_hf.integrations.vllm.plugin:register"'
        in declared
    )


def test_vllm_with_other_internals_is_named_when_a_model_is_loaded(plugin, monkeypatch):
    """Not before: the plugin is called for other models, too."""
    monkeypatch.delattr(sys.modules[f"{LAYERS}.linear"], "LinearBase")
    monkeypatch.delitem(sys.modules, "svdq_hf.integrations.vllm.quantization_config")
    release = sys.modules["vllm"].__version__
    try:
        plugin.register()
        with pytest.raises(ValueError, match=rf"this is vLLM {release}.*tried with 0\.32.*LinearBase"):
            methods()["svdq"].from_config({"quant_method": "svdq"})
    finally:
        methods()["svdq"] = plugin.SVDQVllmConfig


def test_layers_that_round_their_activations_are_refused(plugin):
    with pytest.raises(ValueError, match="activations=4: vLLM runs layers of svdq that round weights alone"):
        plugin.SVDQVllmConfig.from_config(SVDQConfig.resq().to_dict())
