"""Configuration of the quantization: `SVDQConfig`, its presets, and the choices it is made of."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from svdq_hf.config.svdq_config import SVDQConfig

__all__ = ["SVDQConfig"]


def __getattr__(name: str) -> Any:
    """The config, imported when it is first used: it needs transformers, the table of choices does not."""
    if name != "SVDQConfig":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from svdq_hf.config.svdq_config import SVDQConfig

    return SVDQConfig
