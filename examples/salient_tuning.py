"""Fine-tune a quantized model with plain Trainer: the salient weights, biases, norms and head train."""

import sys

from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

from svdq_hf import SVDQConfig, mark_trainable
from svdq_hf.demo import default_model

OUT = sys.argv[1] if len(sys.argv) > 1 else "tuned"
TEXTS = ["what a lovely day", "this is awful", "I enjoyed every minute", "never again, so boring"]

tokenizer = AutoTokenizer.from_pretrained(default_model())
model = AutoModelForSequenceClassification.from_pretrained(
    default_model(), quantization_config=SVDQConfig(k=256)
)
mark_trainable(model)  # prints what trains and how much
data = [{**tokenizer(text), "labels": 1 - i % 2} for i, text in enumerate(TEXTS * 4)]
arguments = TrainingArguments(OUT, num_train_epochs=3, learning_rate=2e-3, report_to=[], save_strategy="no")
Trainer(model, arguments, train_dataset=data, processing_class=tokenizer).train()
model.save_pretrained(OUT)

again = AutoModelForSequenceClassification.from_pretrained(OUT)  # a quantized checkpoint as any other
encoded = tokenizer(TEXTS, padding=True, return_tensors="pt")
print("kind" if again(**encoded).logits[0].argmax() else "unkind", "is:", TEXTS[0])
