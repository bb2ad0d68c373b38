"""Data-free low-bit quantization for Transformers; importing it registers "svdq" with transformers.

>>> from svdq_hf import SVDQConfig
>>> SVDQConfig(k=256).quant_method
'svdq'
"""

from svdq_hf.config import SVDQConfig
from svdq_hf.core.saliency import Scored, register_saliency, saliency_names
from svdq_hf.integrations.peft import patches as _dispatch
from svdq_hf.integrations.transformers.in_memory import dequantize_model, quantize_model
from svdq_hf.integrations.transformers.quantizer import SVDQHfQuantizer
from svdq_hf.nn.linear import SVDQLinear
from svdq_hf.quantize.convert import set_compute
from svdq_hf.quantize.footprint import Footprint, LayerFootprint, footprint, read_footprint
from svdq_hf.training.salient import Trainable, mark_trainable

_dispatch.register()

__version__ = "0.1.0"

__all__ = [
    "Footprint",
    "LayerFootprint",
    "SVDQConfig",
    "SVDQHfQuantizer",
    "SVDQLinear",
    "Scored",
    "Trainable",
    "dequantize_model",
    "footprint",
    "mark_trainable",
    "quantize_model",
    "read_footprint",
    "register_saliency",
    "saliency_names",
    "set_compute",
]
