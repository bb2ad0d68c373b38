"""Tiny random models of families with fused experts: four of them in a layer, two for each token."""

from collections.abc import Callable
from typing import Any

import tiny_models as tiny
import torch
import transformers as hf
from tiny_models import HIDDEN, INNER, VOCABULARY

from svdq_hf.nn.expert_layouts import layout_of

EXPERTS = 4

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 40,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_experts_per_tok": 2,
}  # fmt: skip
LATENT = {
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}


def _mixtral() -> hf.PreTrainedModel:
    return hf.MixtralForCausalLM(hf.MixtralConfig(**_SIZES, num_local_experts=EXPERTS))


def _qwen2_moe() -> hf.PreTrainedModel:
    inner = {"moe_intermediate_size": INNER, "shared_expert_intermediate_size": INNER}
    return hf.Qwen2MoeForCausalLM(hf.Qwen2MoeConfig(**_SIZES, **inner, num_experts=EXPERTS))


def _qwen3_moe() -> hf.PreTrainedModel:
    return hf.Qwen3MoeForCausalLM(
        hf.Qwen3MoeConfig(**_SIZES, moe_intermediate_size=INNER, num_experts=EXPERTS)
    )


def _gpt_oss() -> hf.PreTrainedModel:
    return hf.GptOssForCausalLM(hf.GptOssConfig(**_SIZES, num_local_experts=EXPERTS))


def _llama4() -> hf.PreTrainedModel:
    choices = {"num_local_experts": EXPERTS, "interleave_moe_layer_step": 1, "intermediate_size_mlp": INNER}
    return hf.Llama4ForCausalLM(hf.Llama4TextConfig(**_SIZES, **choices))


def _deepseek_v3() -> hf.PreTrainedModel:
    sizes = {**_SIZES, **LATENT, "num_key_value_heads": 4, "head_dim": 16, "moe_intermediate_size": INNER}
    groups = {"n_routed_experts": EXPERTS, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0}
    return hf.DeepseekV3ForCausalLM(hf.DeepseekV3Config(**sizes, **groups))


def _granitemoe() -> hf.PreTrainedModel:
    """Its files have other names for experts."""
    return hf.GraniteMoeForCausalLM(hf.GraniteMoeConfig(**_SIZES, num_local_experts=EXPERTS))


def _aria() -> hf.PreTrainedModel:
    """Transposed, and not interleaved."""
    sizes = {**_SIZES, "moe_num_experts": EXPERTS, "moe_topk": 2, "moe_num_shared_experts": 1}
    return hf.AriaTextForCausalLM(hf.AriaTextConfig(**sizes))


def _nemotron_h() -> hf.PreTrainedModel:
    """Experts without a gate."""
    sizes = {
        **_SIZES,
        "moe_intermediate_size": INNER,
        "n_routed_experts": EXPERTS,
        "layers_block_type": ["attention", "moe"],
    }
    return hf.NemotronHForCausalLM(hf.NemotronHConfig(**sizes))


def _muse_spark() -> hf.PreTrainedModel:
    """A norm behind each expert."""
    from transformers.models.muse_spark import MuseSparkTextConfig, MuseSparkTextModel

    sizes = {
        **_SIZES,
        "moe_intermediate_size": INNER,
        "moe_hidden_size": HIDDEN,
        "num_local_experts": EXPERTS,
    }
    return MuseSparkTextModel(MuseSparkTextConfig(**sizes))


FAMILIES: dict[str, Callable[[], hf.PreTrainedModel]] = {
    "mixtral": _mixtral,
    "qwen2-moe": _qwen2_moe,
    "qwen3-moe": _qwen3_moe,
    "gpt-oss": _gpt_oss,
    "llama4": _llama4,
    "deepseek-v3": _deepseek_v3,
    "granitemoe": _granitemoe,
    "aria": _aria,
    "nemotron-h": _nemotron_h,
    "muse-spark": _muse_spark,
}


def build(family: str) -> hf.PreTrainedModel:
    """The model with experts that matter: fresh ones hardly change what passes by, biases are zero."""
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    with torch.no_grad():
        for module in model.modules():
            if layout_of(module) is not None:
                for parameter in module.parameters(recurse=False):
                    parameter.normal_(0, 0.2)
    return model


def output(model: torch.nn.Module) -> torch.Tensor:
    return tiny.outputs(model, {"input_ids": tiny.tokens()})


def qwen3_vl_moe() -> hf.PreTrainedModel:
    """A family that has files of both orientations."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96}
    text = {**sizes, **experts, "vocab_size": 96, "head_dim": 16, "intermediate_size": 96}
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}}
    vision = {"hidden_size": 64, "intermediate_size": 96, "depth": 1, "num_heads": 4, "out_hidden_size": 64}
    config = hf.Qwen3VLMoeConfig(
        text_config={**text, **rope}, vision_config={**vision, "deepstack_visual_indexes": [0]}
    )
    torch.manual_seed(0)
    return hf.Qwen3VLMoeForConditionalGeneration(config).eval()
