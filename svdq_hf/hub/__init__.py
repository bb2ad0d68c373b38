"""The Hugging Face Hub: push a quantized model, with its card."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from svdq_hf.hub.card import CardResult, write_card
    from svdq_hf.hub.push import push_folder, push_model

__all__ = ["CardResult", "push_folder", "push_model", "write_card"]

_PLACES = {"CardResult": "card", "push_folder": "push", "push_model": "push", "write_card": "card"}


def __getattr__(name: str) -> object:
    """The public names, imported when they are first used: finding a folder needs neither torch nor a card.

    Raises:
        AttributeError: the package has no such name.
    """
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
