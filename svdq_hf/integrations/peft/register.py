"""How PEFT learns of quantized layers, with no call by the user and without importing PEFT.

PEFT picks the LoRA layer for a layer from a fixed list of functions, and "all-linear" from a fixed list of
classes. Its only registration, `LoraConfig._register_custom_module`, is forgotten when the adapter is
saved. So two of its functions are wrapped when PEFT is imported (`registration`). For what is not ours they
answer as before.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any

LAYERS, TUNERS, USER = "peft.tuners.lora.layer", "peft.tuners.tuners_utils", "peft.tuners.lora.model"
"""The modules that define the two functions, and one that imports the first by name."""
WATCHED = (LAYERS, TUNERS, USER)


def register() -> None:
    """Let PEFT put LoRA on quantized layers, as far as it is imported; a second call does nothing."""
    for module, name, wrap in (
        (LAYERS, "dispatch_default", _dispatch),
        (USER, "dispatch_default", _dispatch),
        (TUNERS, "_maybe_include_all_linear_layers", _all_linear),
    ):
        found = getattr(sys.modules.get(module), name, None)
        if found is not None and not hasattr(found, "knows_svdq"):
            wrapper = functools.wraps(found)(wrap(found))
            wrapper.knows_svdq = True  # type: ignore[attr-defined]
            setattr(sys.modules[module], name, wrapper)


def has_adapters(model: Any) -> bool:
    """Whether PEFT has put adapters into a model; where PEFT was never imported there are none."""
    layer = getattr(sys.modules.get(TUNERS), "BaseTunerLayer", None)
    return layer is not None and any(isinstance(module, layer) for module in model.modules())


def _dispatch(default: Callable[..., Any]) -> Callable[..., Any]:
    """The LoRA layer for a layer: ours first."""

    def dispatch(target: Any, adapter_name: str, config: Any, **kwargs: Any) -> Any:
        from svdq_hf.integrations.peft.lora import lora_layer

        ours = lora_layer(target, adapter_name, config, **kwargs)
        return default(target, adapter_name, config=config, **kwargs) if ours is None else ours

    return dispatch


def _all_linear(default: Callable[..., Any]) -> Callable[..., Any]:
    """target_modules="all-linear" made a set of names: with the quantized layers, as for a dense model."""

    def include(peft_config: Any, model: Any) -> Any:
        from svdq_hf.integrations.peft.lora import check_whole, linear_names

        check_whole(model, peft_config)
        asked = getattr(peft_config, "target_modules", None)
        result = default(peft_config, model)
        if isinstance(asked, str) and isinstance(result.target_modules, set):
            result.target_modules |= linear_names(model)
        return result

    return include
