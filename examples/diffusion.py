"""A diffusers model: `quantize_model` takes any torch module, and this one keeps its own saving.

    pip install diffusers

The transformer is tiny and random; take a pipeline's own (`pipe.transformer`, `pipe.unet`) in its place.
It is quantized in memory, after loading; `save_pretrained` of diffusers does not know the format.
"""

import torch
from diffusers import DiTTransformer2DModel

from svdq_hf import SVDQConfig, SVDQLinear, quantize_model

torch.manual_seed(0)
sizes = {"num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 2, "sample_size": 8}
model = DiTTransformer2DModel(in_channels=4, out_channels=4, norm_num_groups=2, **sizes).eval()
noise = torch.randn(1, 4, 8, 8)
step = {"timestep": torch.tensor([10]), "class_labels": torch.tensor([3])}
with torch.no_grad():
    dense = model(noise, **step).sample
    quantize_model(model, SVDQConfig(k=64, modules_to_not_convert=["proj_out_1", "proj_out_2"]))
    quantized = model(noise, **step).sample

layers = [name for name, module in model.named_modules() if isinstance(module, SVDQLinear)]
cosine = torch.nn.functional.cosine_similarity(quantized.flatten(), dense.flatten(), dim=0).item()
print(f"{len(layers)} layers quantized; cosine to the dense model {cosine:.3f}")
