"""ONNX through `dequantize()`: the file is dense and FP32, with the weights that the quantized model has.

    pip install onnx onnxscript onnxruntime

ONNX has no word for our packed weights; quantize the file anew with onnxruntime's own tools if it must be
small. `optimum-cli export onnx` reads what `svdq export FOLDER OUT --dtype float32` writes.
"""

import tempfile
from pathlib import Path

import onnxruntime
import torch
from transformers import AutoModel, AutoTokenizer

from svdq_hf import SVDQConfig
from svdq_hf.demo import default_model

model = AutoModel.from_pretrained(default_model(), quantization_config=SVDQConfig(k=256)).eval()
inputs = dict(AutoTokenizer.from_pretrained(default_model())("It rains.", return_tensors="pt"))
with tempfile.TemporaryDirectory() as folder, torch.no_grad():
    quantized = model(**inputs).last_hidden_state
    file = str(Path(folder) / "minilm.onnx")
    torch.onnx.export(model.dequantize(), (), file, kwargs=inputs, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(file)
    onnx = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})[0]
print(f"largest difference: {abs(onnx - quantized.numpy()).max():.1e}")
