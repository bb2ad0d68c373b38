"""Fused experts of a model: quantized one after the other, and checked.

Not here: the loop that replaces them in a model (`quantize.convert`), the quantized module (`nn.experts`),
and which classes are known (`nn.expert_layouts`).
"""

import logging
from collections.abc import Mapping

from torch import nn

from svdq_hf.config import SVDQConfig
from svdq_hf.nn.expert_layouts import layout_of, stacks_of, unknown_experts
from svdq_hf.nn.experts import SVDQExperts
from svdq_hf.quantize.weight import check_weight, quantize_stack

logger = logging.getLogger(__name__)


def empty_experts(module: nn.Module, config: SVDQConfig, device: str = "meta") -> SVDQExperts:
    """An SVDQExperts with the shape of dense fused experts and with buffers that hold no values yet.

    Args:
        module: the dense fused experts.
        config: of the whole model.
        device: of the buffers.
    """
    return SVDQExperts(module, config.scheme, device=device, compute_dtype=config.torch_compute_dtype)


def quantized_experts(name: str, module: nn.Module, config: SVDQConfig) -> SVDQExperts:
    """The SVDQExperts for dense fused experts, quantized one expert after the other.

    Args:
        name: of the module, for errors.
        module: the dense fused experts.
        config: of the whole model.

    Raises:
        ValueError: see `quantize_weight`.
    """
    experts, config = empty_experts(module, config), config.without_data()
    for matrix in experts.stacks:
        dense = getattr(module, matrix).detach()
        parts, experts.facts[matrix] = quantize_stack(
            dense, config, f"{name}.{matrix}", transposed=experts.layout.transposed
        )
        experts.load_stack(matrix, parts)
    return experts


def check_experts(name: str, module: nn.Module) -> None:
    """Refuse fused experts of which one weight cannot be quantized.

    Args:
        name: of the module, for errors.
        module: the dense fused experts.

    Raises:
        ValueError: see `check_weight`; it names the expert.
    """
    for stored in stacks_of(name, module):
        for expert, weight in enumerate(getattr(module, stored.name.rpartition(".")[2]).detach()):
            check_weight(f"{stored.name}, expert {expert}", weight)


def warn_of_unknown(modules: Mapping[str, nn.Module]) -> None:
    """Log a warning that fused experts of unknown classes stay dense.

    Args:
        modules: of the whole model, by name.
    """
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
    """Check the choices that do not reach fused experts: a budget, and what is read from data.

    A budget is refused; that scores from data and error feedback are left out is logged as a warning.

    Args:
        chosen: the modules to quantize, by name.
        config: how they are quantized.

    Raises:
        ValueError: it names the first experts and the remedy.
    """
    experts = [name for name, module in chosen.items() if layout_of(module) is not None]
    if experts and config.target_bits is not None and config.layer_k is None:
        raise ValueError(
            f"target_bits={config.target_bits}: fused experts ({experts[0]}) have one k each, and no budget; "
            "give k, or keep them dense with modules_to_not_convert=['experts']"
        )
    if not experts or not config.data_needs:
        return
    logger.warning(
        "fused experts are quantized without data, by saliency %r and without error feedback: %d modules, "
        "%s%s",
        config.without_data().saliency,
        len(experts),
        ", ".join(experts[:3]),
        ", ..." if len(experts) > 3 else "",
    )
