"""EleutherAI's harness on a quantized model, through its Python API; on the command line: `svdq lm-eval`.

    pip install -e '.[lm-eval]'

Model, tokenizer and task are of the smallest; take `tasks=["hellaswag"]` and a trained model in their place.
"""

import lm_eval
from datasets import Dataset
from lm_eval.models.huggingface import HFLM
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from svdq_hf import SVDQConfig, quantize_model
from svdq_hf.demo import default_model

tokenizer = AutoTokenizer.from_pretrained(default_model(), bos_token="[CLS]", eos_token="[SEP]")
sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
config = LlamaConfig(vocab_size=len(tokenizer), bos_token_id=101, eos_token_id=102, **sizes)
model = quantize_model(LlamaForCausalLM(config), SVDQConfig(k=64))
task = {
    "task": "colours", "output_type": "multiple_choice", "test_split": "test", "doc_to_text": "{{question}}",
    "doc_to_choice": ["green", "blue"], "doc_to_target": "{{answer}}",
    "custom_dataset": lambda **_: {"test": Dataset.from_list([{"question": "Grass is", "answer": 0}])},
}  # fmt: skip
results = lm_eval.simple_evaluate(HFLM(pretrained=model, tokenizer=tokenizer), tasks=[task])
print(results["results"]["colours"])
