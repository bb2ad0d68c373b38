"""Sentence Transformers on quantized weights: the config goes through `model_kwargs`; saving works as ever.

pip install sentence-transformers
"""

import tempfile

from sentence_transformers import SentenceTransformer

from svdq_hf import SVDQConfig
from svdq_hf.demo import default_model

sentences = ["A man plays a guitar.", "Somebody makes music.", "It rains."]
choices = {"quantization_config": SVDQConfig(k=256)}
model = SentenceTransformer(str(default_model()), model_kwargs=choices)
embeddings = model.encode(sentences)

with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    again = SentenceTransformer(folder).encode(sentences)

print(model.similarity(embeddings, embeddings))
print((again == embeddings).all())
