"""Vision-text models: one pattern keeps the tower dense, whatever its family calls it."""

import pytest
import torch
import transformers as hf
from transformers import CLIPVisionConfig, LlamaConfig

from svdq_hf import SVDQConfig
from svdq_hf.quantize.selection import layers_to_convert

PATTERN = ".*vis(ion|ual).*"
"""As docs/guide.md has it."""
SMALL = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}


def llava():
    vision = CLIPVisionConfig(image_size=16, patch_size=8, **SMALL)
    text = LlamaConfig(vocab_size=99, **SMALL)
    return hf.LlavaForConditionalGeneration(hf.LlavaConfig(vision_config=vision, text_config=text))


def smolvlm():
    config = hf.SmolVLMConfig(vision_config=SMALL, text_config={"model_type": "llama", **SMALL})
    return hf.SmolVLMForConditionalGeneration(config)


def qwen():
    vision = {"depth": 1, "hidden_size": 64, "intermediate_size": 64, "num_heads": 4, "out_hidden_size": 64}
    config = hf.Qwen2_5_VLConfig(vision_config=vision, text_config=SMALL)
    return hf.Qwen2_5_VLForConditionalGeneration(config)


@pytest.mark.parametrize(
    ("build", "tower"), [(llava, "vision_tower."), (smolvlm, "vision_model."), (qwen, "visual.")]
)
def test_one_pattern_keeps_the_tower_dense_and_nothing_else(build, tower):
    with torch.device("meta"):
        model = build()
    every = set(layers_to_convert(model, SVDQConfig()))
    chosen = set(layers_to_convert(model, SVDQConfig(modules_to_not_convert=[PATTERN])))
    assert chosen == {name for name in every if tower not in name}
    assert len(every) - len(chosen) >= 4
    assert any("language_model" in name or "text_model" in name for name in chosen)
