"""Configuration of the quantization: `SVDQConfig`, its presets, and the choices it is made of."""

from svdq_hf.config.svdq_config import SVDQConfig

__all__ = ["SVDQConfig"]
