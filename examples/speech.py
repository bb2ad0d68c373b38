"""Speech recognition with a quantized model, given to `pipeline` with its tokenizer and feature extractor.

The model is tiny and random, so it hears letters in noise: name a trained one in its place.
"""

import json
import tempfile
from pathlib import Path

import numpy
import transformers as hf

from svdq_hf import SVDQConfig, quantize_model

sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
letters = ["<pad>", "<s>", "</s>", "<unk>", "|", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ'"]
with tempfile.TemporaryDirectory() as folder:
    vocabulary = Path(folder) / "vocab.json"
    vocabulary.write_text(json.dumps({letter: place for place, letter in enumerate(letters)}))
    tokenizer = hf.Wav2Vec2CTCTokenizer(str(vocabulary))

config = hf.Wav2Vec2Config(vocab_size=len(letters), conv_dim=(32,) * 7, **sizes)
model = quantize_model(hf.Wav2Vec2ForCTC(config), SVDQConfig(k=64))
parts = {"tokenizer": tokenizer, "feature_extractor": hf.Wav2Vec2FeatureExtractor()}
listen = hf.pipeline("automatic-speech-recognition", model=model, **parts)
heard = listen(numpy.random.default_rng(0).standard_normal(16000, dtype="float32"))
print(heard["text"])
