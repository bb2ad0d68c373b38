"""Checkpoints, folder to folder: quantize one, export it dense, estimate what either costs.

Not here: a model in memory (`integrations.transformers.in_memory`).
"""

from svdq_hf.checkpoint.estimate import estimate_checkpoint
from svdq_hf.checkpoint.export import export_dense
from svdq_hf.checkpoint.quantize import quantize_checkpoint
from svdq_hf.checkpoint.source import Source

__all__ = ["Source", "estimate_checkpoint", "export_dense", "quantize_checkpoint"]
