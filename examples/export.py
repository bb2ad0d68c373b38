"""torch.export of a quantized model into one file, and back: no transformers is needed to run it.

The program that loads it says `import svdq_hf`, which brings the op `svdq::linear`. Any number of sentences
and of tokens will do.
"""

import tempfile
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer

from svdq_hf import SVDQConfig
from svdq_hf.demo import default_model

model = AutoModel.from_pretrained(default_model(), quantization_config=SVDQConfig(k=256)).eval()
tokenizer = AutoTokenizer.from_pretrained(default_model())
two = dict(tokenizer(["A man plays a guitar.", "It rains."], padding=True, return_tensors="pt"))
one = dict(tokenizer("A sentence of another length.", return_tensors="pt"))

shapes = {name: {0: torch.export.Dim("sentences"), 1: torch.export.Dim("tokens", max=512)} for name in two}
with tempfile.TemporaryDirectory() as folder, torch.no_grad():
    file = Path(folder) / "minilm.pt2"
    torch.export.save(torch.export.export(model, (), two, dynamic_shapes=shapes), file)
    loaded = torch.export.load(file).module()
    answers = [(loaded(**each)["last_hidden_state"], model(**each)[0]) for each in (two, one)]
print([torch.equal(ours, theirs) for ours, theirs in answers])
