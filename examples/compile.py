"""torch.compile on a quantized model, whole (`fullgraph=True`), and what `generate` compiles by itself.

A quantized layer is one node of the graph. `generate` compiles with a static cache; on GPUs it does so
unasked, on a CPU it wants a word. Compiling needs a C++ compiler and takes a minute.
"""

import torch
from transformers import CompileConfig, LlamaConfig, LlamaForCausalLM

from svdq_hf import SVDQConfig, quantize_model

sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
torch.manual_seed(0)
model = quantize_model(LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **sizes)), SVDQConfig(k=64)).eval()
tokens = torch.tensor([[1, 17, 42, 8]])
with torch.no_grad():
    plain = model(tokens).logits
    compiled = torch.compile(model, fullgraph=True)(tokens).logits

choices = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 8, "do_sample": False}
written = model.generate(tokens, **choices)
on_cpu = CompileConfig(fullgraph=True)
on_cpu._compile_all_devices = True
again = model.generate(tokens, cache_implementation="static", compile_config=on_cpu, **choices)
print(f"largest difference of a logit: {(compiled - plain).abs().max():.1e}")
print(torch.equal(again, written))
