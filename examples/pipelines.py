"""Pipelines on quantized models: by name with `model_kwargs`, or given a model that is quantized already.

The writer is tiny and random, and the heads for masked words and classes are new, so the answers mean
nothing: name a trained model there. Speech is in `speech.py`.
"""

from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, pipeline

from svdq_hf import SVDQConfig, quantize_model
from svdq_hf.demo import default_model

sentence = "Paris is a [MASK]."
name, choices = str(default_model()), {"quantization_config": SVDQConfig(k=64)}

embedded = pipeline("feature-extraction", model=name, model_kwargs=choices)(sentence)
label = pipeline("text-classification", model=name, model_kwargs=choices)(sentence)
words = pipeline("fill-mask", model=name, model_kwargs=choices)(sentence, top_k=3)

tokenizer = AutoTokenizer.from_pretrained(name)
sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
writer = quantize_model(LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)))
story = pipeline("text-generation", model=writer, tokenizer=tokenizer)("Once", max_new_tokens=5)

print(f"{len(embedded[0])} tokens of {len(embedded[0][0])} numbers; {label[0]['label']}")
print([word["token_str"] for word in words], story[0]["generated_text"])
