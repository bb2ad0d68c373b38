"""Patches of PEFT (0.21 to 0.22): every change that svdq_hf makes to it, and why.

Functions are wrapped, for the whole process: now if PEFT is imported already, otherwise when it is
imported. The user calls nothing, and PEFT is not imported for it. For other layers they work as before.

peft.tuners.lora.layer.dispatch_default (and under its name in peft.tuners.lora.model)
    Why: PEFT picks the LoRA layer for a layer from a fixed list of functions. Its only registration,
    `LoraConfig._register_custom_module`, is forgotten when the adapter is saved.
    Fails when not needed: `test_peft_has_no_layer_for_a_quantized_one`.
peft.tuners.tuners_utils._maybe_include_all_linear_layers
    Why: "all-linear" is made of a fixed list of classes.
    Fails when not needed: `test_peft_does_not_count_quantized_layers_among_all_linear`.
PeftModel.get_nb_trainable_parameters (and PeftMixedModel's), which print_trainable_parameters prints
    Why: it counts the bytes of packed weights; bitsandbytes' 4 bits alone are known to it.
    Fails when not needed: `test_peft_counts_packed_bytes`.

No upstream issue is known for any. Not here: transformers (`integrations.transformers.patches`).
"""

import functools
import sys
from collections.abc import Callable
from typing import Any

LAYERS, TUNERS, USER = "peft.tuners.lora.layer", "peft.tuners.tuners_utils", "peft.tuners.lora.model"
"""The modules that define two of the functions, and one that imports the first by name."""
MODEL, MIXED = "peft.peft_model", "peft.mixed_model"
WATCHED = (LAYERS, TUNERS, USER, MODEL, MIXED)


def register() -> None:
    """Let PEFT put LoRA on quantized layers, in its modules imported so far; a second call does nothing."""
    for module, name, wrap in (
        (LAYERS, "dispatch_default", _dispatch),
        (USER, "dispatch_default", _dispatch),
        (TUNERS, "_maybe_include_all_linear_layers", _all_linear),
        (MODEL, "PeftModel.get_nb_trainable_parameters", _counts),
        (MIXED, "PeftMixedModel.get_nb_trainable_parameters", _counts),
    ):
        owner: Any = sys.modules.get(module)
        *holder, name = name.split(".")
        owner = getattr(owner, holder[0], None) if holder else owner
        found = getattr(owner, name, None)
        if found is not None and not hasattr(found, "knows_svdq"):
            wrapper = functools.wraps(found)(wrap(found))
            wrapper.knows_svdq = True  # type: ignore[attr-defined]
            setattr(owner, name, wrapper)


def has_adapters(model: Any) -> bool:
    """Whether PEFT has put adapters into a model; where PEFT was never imported there are none."""
    layer = getattr(sys.modules.get(TUNERS), "BaseTunerLayer", None)
    return layer is not None and any(isinstance(module, layer) for module in model.modules())


def _dispatch(default: Callable[..., Any]) -> Callable[..., Any]:
    """PEFT's choice of a LoRA layer, with ours tried first."""

    def dispatch(target: Any, adapter_name: str, config: Any, **kwargs: Any) -> Any:
        from svdq_hf.integrations.peft.lora import lora_layer

        ours = lora_layer(target, adapter_name, config, **kwargs)
        return default(target, adapter_name, config=config, **kwargs) if ours is None else ours

    return dispatch


def _all_linear(default: Callable[..., Any]) -> Callable[..., Any]:
    """PEFT's expansion of target_modules="all-linear" to names, with the quantized layers included."""

    def include(peft_config: Any, model: Any) -> Any:
        from svdq_hf.integrations.peft.lora import check_whole, linear_names

        check_whole(model, peft_config)
        asked = getattr(peft_config, "target_modules", None)
        result = default(peft_config, model)
        if isinstance(asked, str) and isinstance(result.target_modules, set):
            result.target_modules |= linear_names(model)
        return result

    return include


def _counts(default: Callable[..., Any]) -> Callable[..., Any]:
    """How many weights train, and how many there are: as many as the dense model has, packed or not."""

    def count(model: Any) -> tuple[int, int]:
        from svdq_hf.nn.inventory import uncounted_weights

        trainable, total = default(model)
        return trainable, total + uncounted_weights(model)

    return count
