"""Data-free low-bit quantization for Transformers; importing it registers "svdq" with transformers.

Light: torch and transformers are imported when a name below is first used, and "svdq" is registered when
they are imported, whoever does it.

>>> from svdq_hf import SVDQConfig
>>> SVDQConfig(k=256).quant_method
'svdq'
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from svdq_hf.core.release import VERSION
from svdq_hf.integrations.registration import register as _register

if TYPE_CHECKING:  # for type checkers and editors; `_HOMES` says the same to Python
    from svdq_hf.config import SVDQConfig
    from svdq_hf.core.saliency import Scored, register_saliency, saliency_names
    from svdq_hf.integrations.gguf.quantize import GGUFReport, quantize_gguf
    from svdq_hf.integrations.transformers.cache import SVDQCache
    from svdq_hf.integrations.transformers.in_memory import dequantize_model, quantize_model
    from svdq_hf.integrations.transformers.quantizer import SVDQHfQuantizer
    from svdq_hf.nn.linear import SVDQLinear
    from svdq_hf.quantize.convert import set_compute
    from svdq_hf.quantize.footprint import Footprint, LayerFootprint, footprint, read_footprint
    from svdq_hf.quantize.sensitivity import sensitivity
    from svdq_hf.quantize.sensitivity_result import Sensitivity
    from svdq_hf.training.salient import Trainable, mark_trainable
    from svdq_hf.training.spectral_decay import SpectralDecay
    from svdq_hf.training.spectral_decay_callback import SpectralDecayCallback

__version__ = VERSION

__all__ = [
    "Footprint",
    "GGUFReport",
    "LayerFootprint",
    "SVDQCache",
    "SVDQConfig",
    "SVDQHfQuantizer",
    "SVDQLinear",
    "Scored",
    "Sensitivity",
    "SpectralDecay",
    "SpectralDecayCallback",
    "Trainable",
    "dequantize_model",
    "footprint",
    "mark_trainable",
    "quantize_gguf",
    "quantize_model",
    "read_footprint",
    "register_saliency",
    "saliency_names",
    "sensitivity",
    "set_compute",
]

_HOMES = {
    "svdq_hf.config": ("SVDQConfig",),
    "svdq_hf.core.saliency": ("Scored", "register_saliency", "saliency_names"),
    "svdq_hf.integrations.gguf.quantize": ("GGUFReport", "quantize_gguf"),
    "svdq_hf.integrations.transformers.cache": ("SVDQCache",),
    "svdq_hf.integrations.transformers.in_memory": ("dequantize_model", "quantize_model"),
    "svdq_hf.integrations.transformers.quantizer": ("SVDQHfQuantizer",),
    "svdq_hf.nn.linear": ("SVDQLinear",),
    "svdq_hf.quantize.convert": ("set_compute",),
    "svdq_hf.quantize.footprint": ("Footprint", "LayerFootprint", "footprint", "read_footprint"),
    "svdq_hf.quantize.sensitivity": ("sensitivity",),
    "svdq_hf.quantize.sensitivity_result": ("Sensitivity",),
    "svdq_hf.training.salient": ("Trainable", "mark_trainable"),
    "svdq_hf.training.spectral_decay": ("SpectralDecay",),
    "svdq_hf.training.spectral_decay_callback": ("SpectralDecayCallback",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """A public name, imported when it is first used (PEP 562).

    Raises:
        AttributeError: the package has no such name.
    """
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_register()
