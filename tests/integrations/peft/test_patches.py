"""What PEFT does where svdq_hf changes nothing of it: the changes are needed while these pass."""

import pytest
import tiny_models as tiny

from svdq_hf import SVDQConfig, SVDQLinear, quantize_model

pytest.importorskip("peft", reason="needs PEFT: pip install -e '.[peft]'")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing:FutureWarning")  # PEFT's own

LAYER = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def lora():
    from peft import LoraConfig

    return LoraConfig(r=2)


def test_peft_has_no_layer_for_a_quantized_one(lora):
    from peft.tuners.lora.layer import dispatch_default

    layer = SVDQLinear(64, 64)
    assert dispatch_default.__wrapped__(layer, "default", config=lora, r=2, lora_alpha=2) is None
    assert dispatch_default(layer, "default", config=lora, r=2, lora_alpha=2) is not None


def test_peft_does_not_count_quantized_layers_among_all_linear(lora):
    from peft.tuners.tuners_utils import _maybe_include_all_linear_layers as include

    model = quantize_model(tiny.llama(), SVDQConfig(k=9))
    lora.target_modules = "all-linear"
    assert LAYER not in include.__wrapped__(lora, model).target_modules
    lora.target_modules = "all-linear"
    assert LAYER in include(lora, model).target_modules


@pytest.mark.parametrize("mixed", [False, True], ids=["one kind", "mixed"])
def test_peft_counts_packed_bytes(lora, mixed):
    from peft import PeftMixedModel, PeftModel, get_peft_model

    lora.target_modules = ["q_proj"]
    dense = get_peft_model(tiny.llama(), lora, mixed=mixed).get_nb_trainable_parameters()
    model = get_peft_model(quantize_model(tiny.llama(), SVDQConfig(k=9)), lora, mixed=mixed)
    kind = PeftMixedModel if mixed else PeftModel
    assert kind.get_nb_trainable_parameters.__wrapped__(model)[1] < dense[1]
    assert model.get_nb_trainable_parameters() == dense


def test_what_peft_prints_is_of_all_weights(lora, capsys):
    from peft import get_peft_model

    lora.target_modules = ["q_proj"]
    get_peft_model(tiny.llama(), lora).print_trainable_parameters()
    dense = capsys.readouterr().out
    get_peft_model(quantize_model(tiny.llama(), SVDQConfig(k=9)), lora).print_trainable_parameters()
    assert capsys.readouterr().out == dense
