"""Model cards, under their public path: see `svdq_hf.hub.card`."""

from svdq_hf.hub.card import CardResult, write_card

__all__ = ["CardResult", "write_card"]
