"""`generate` on a quantized model: a static cache, beams, and a smaller quantized model that drafts.

The models are tiny and random: name trained ones instead, with `from_pretrained(..., quantization_config=)`.
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from svdq_hf import SVDQConfig, quantize_model

sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
torch.manual_seed(0)
model = quantize_model(LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **sizes)), SVDQConfig(k=64))
draft = quantize_model(LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes)), SVDQConfig(k=0))
prompt = torch.tensor([[1, 17, 42, 8]])
choices = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 8, "do_sample": False}

plain = model.generate(prompt, **choices)
static = model.generate(prompt, cache_implementation="static", **choices)
beams = model.generate(prompt, num_beams=3, **choices)
assisted = model.generate(prompt, assistant_model=draft, **choices)

print(plain[0].tolist())
print(torch.equal(static, plain), torch.equal(assisted, plain), beams.shape[1])
