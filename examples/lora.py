"""LoRA of PEFT on a quantized model, started from what quantizing lost; saved, and loaded on a fresh base."""

import sys

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

from svdq_hf import SVDQConfig
from svdq_hf.demo import default_model
from svdq_hf.integrations.peft.adapters import init_adapters_from_error

OUT = sys.argv[1] if len(sys.argv) > 1 else "adapter"
TEXTS = ["what a lovely day", "this is awful", "I enjoyed every minute", "never again, so boring"]
load = AutoModelForSequenceClassification.from_pretrained

tokenizer = AutoTokenizer.from_pretrained(default_model())
base = load(default_model(), quantization_config=SVDQConfig())
lora = LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"], modules_to_save=["classifier"])
model = get_peft_model(base, lora)  # no registration
init_adapters_from_error(model, default_model())
data = [{**tokenizer(text), "labels": 1 - i % 2} for i, text in enumerate(TEXTS * 4)]
arguments = TrainingArguments(OUT, learning_rate=2e-3, report_to=[], save_strategy="no")
Trainer(model, arguments, train_dataset=data, processing_class=tokenizer).train()
model.save_pretrained(OUT)
again = PeftModel.from_pretrained(load(default_model(), quantization_config=SVDQConfig()), OUT)
encoded = tokenizer(TEXTS, padding=True, return_tensors="pt")
print("equal bit for bit:", torch.equal(again(**encoded).logits, model.eval()(**encoded).logits))
