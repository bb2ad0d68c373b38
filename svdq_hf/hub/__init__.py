"""The Hugging Face Hub: push a quantized model, with its card."""

from svdq_hf.hub.card import CardResult, write_card
from svdq_hf.hub.push import push_folder, push_model

__all__ = ["CardResult", "push_folder", "push_model", "write_card"]
