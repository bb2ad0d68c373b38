"""Adapters of PEFT on quantized models, under their public path: see `svdq_hf.integrations.peft.adapters`."""

from svdq_hf.integrations.peft.adapters import Merged, init_adapters_from_error, merge_adapters

__all__ = ["Merged", "init_adapters_from_error", "merge_adapters"]
