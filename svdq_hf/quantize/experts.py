"""Fused experts of a model, quantized: what `convert` does to them, and what it must say of them."""

import logging
from collections.abc import Mapping

from torch import nn

from svdq_hf.config import SVDQConfig
from svdq_hf.core.saliency import data_needs
from svdq_hf.nn.expert_layouts import layout_of, stacks_of, unknown_experts
from svdq_hf.nn.experts import SVDQExperts
from svdq_hf.quantize.weight import check_weight, quantize_stack

logger = logging.getLogger(__name__)


def empty_experts(module: nn.Module, config: SVDQConfig, device: str = "meta") -> SVDQExperts:
    """An SVDQExperts of the shape of dense fused experts, with nothing in it yet."""
    return SVDQExperts(module, config.scheme, device=device, compute_dtype=config.torch_compute_dtype)


def quantized_experts(name: str, module: nn.Module, config: SVDQConfig) -> SVDQExperts:
    """The quantized module of dense fused experts, one expert after the other.

    Raises:
        ValueError: see `quantize_weight`.
    """
    experts = empty_experts(module, config)
    for matrix in experts.stacks:
        dense = getattr(module, matrix).detach()
        parts, experts.facts[matrix] = quantize_stack(
            dense, config, f"{name}.{matrix}", transposed=experts.layout.transposed
        )
        experts.load_stack(matrix, parts)
    return experts


def check_experts(name: str, module: nn.Module) -> None:
    """`check_weight` for each of the experts called `name`.

    Raises:
        ValueError: see there.
    """
    for stored in stacks_of(name, module):
        for expert, weight in enumerate(getattr(module, stored.name.rpartition(".")[2]).detach()):
            check_weight(f"{stored.name}, expert {expert}", weight)


def warn_of_unknown(modules: Mapping[str, nn.Module]) -> None:
    """Name fused experts of classes that are not known: they stay dense."""
    dense = {name: type(module).__name__ for name, module in modules.items() if unknown_experts(module)}
    if dense:
        logger.warning(
            "fused experts of a class that svdq_hf does not know stay dense: %s: %d modules, %s%s",
            ", ".join(sorted(set(dense.values()))),
            len(dense),
            ", ".join(list(dense)[:3]),
            ", ..." if len(dense) > 3 else "",
        )


def check_expert_choices(chosen: Mapping[str, nn.Module], config: SVDQConfig) -> None:
    """Refuse or say what is not done for experts: a budget, and what batches would tell of their inputs.

    Raises:
        ValueError: it names the first experts, and the remedy.
    """
    experts = [name for name, module in chosen.items() if layout_of(module) is not None]
    if experts and config.target_bits is not None and config.layer_k is None:
        raise ValueError(
            f"target_bits={config.target_bits}: fused experts ({experts[0]}) have one k each, and no budget; "
            "give k, or keep them dense with modules_to_not_convert=['experts']"
        )
    if not experts or not config.data_needs:
        return
    if data_needs(config.saliency):
        raise ValueError(
            f"saliency {config.saliency!r} needs data, and of fused experts' inputs none is collected "
            f"({experts[0]}): take a score without data, or keep them dense with "
            "modules_to_not_convert=['experts']"
        )
    logger.warning(
        "error feedback does not reach fused experts: %d modules are quantized without, %s%s",
        len(experts),
        ", ".join(experts[:3]),
        ", ..." if len(experts) > 3 else "",
    )
