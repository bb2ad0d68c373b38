"""Salient tuning: train the salient weights, biases, norms and head of a quantized model, nothing else.

The packed weights are integers and stay; the rest are floats and can train with the plain `Trainer`, with
no adapter. Not here: adapters (`integrations.peft`).
"""

from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from torch import nn

from svdq_hf.core.arguments import checked_arguments
from svdq_hf.format.names import is_salient_values
from svdq_hf.nn.integer_linear import NO_GRADIENT, SVDQIntegerLinear
from svdq_hf.nn.inventory import number_of_weights, packed_weights, svdq_layers
from svdq_hf.quantize.selection import heads

ADAMW_BYTES = 4 + 4 + 4
"""Per trained FP32 weight: its gradient and AdamW's two moments."""

ROUTING = ("expert_bias", "e_score_correction_bias")
"""Parameters called a bias that balance experts; no gradient reaches them."""


@dataclass(frozen=True)
class Trainable:
    """How many weights of a model train.

    Attributes:
        counts: trained weights of each kind: "salient", "biases", "norms", "head".
        frozen: weights that do not train; a packed weight counts as one.
    """

    counts: dict[str, int]
    frozen: int

    @property
    def total(self) -> int:
        """Number of weights that train."""
        return sum(self.counts.values())

    @property
    def share(self) -> float:
        """Trained weights as a share of all, from 0 to 1."""
        return self.total / (self.total + self.frozen)

    def __rich__(self) -> Table:
        table = Table("trains", "weights", "gradient and AdamW, MB", title="Salient tuning")
        for kind, count in {**self.counts, "in all": self.total}.items():
            table.add_row(kind, f"{count:,}", f"{count * ADAMW_BYTES / 1e6:.2f}")
        table.add_row("frozen", f"{self.frozen:,}", "0")
        return table

    def __str__(self) -> str:
        parts = ", ".join(f"{kind} {count:,}" for kind, count in self.counts.items())
        return f"{self.total:,} weights train ({self.share:.2%}): {parts}"


@checked_arguments(model="load it first, and quantize_model(model)")
def mark_trainable(
    model: nn.Module,
    *,
    salient: bool = True,
    biases: bool = True,
    norms: bool = True,
    head: bool = True,
    show: bool = True,
) -> Trainable:
    """Let some kinds of a quantized model's parameters train and freeze all others.

    Args:
        model: a quantized model without adapters; `requires_grad` of its parameters is set in place.
        salient: the salient weights of every quantized layer.
        biases: the biases of every layer.
        norms: the weights of normalizations (modules whose class has "Norm" in its name).
        head: what is outside the base model (a classifier). An output layer over a vocabulary is not meant,
            which is as large as the embedding and often is the embedding itself; to train it, call
            `model.get_output_embeddings().requires_grad_()`.
        show: whether a table of the counts is printed.

    Returns:
        How many weights train, by kind.

    Raises:
        TypeError: an argument is of a wrong type (`WrongKind`, which is a ValueError as well).
        ValueError: the model is not quantized, rounds its activations, has adapters, or nothing would train.
    """
    if next(packed_weights(model), None) is None:
        raise ValueError(
            "the model has no quantized layer: quantize_model(model) first, or train it as any other"
        )
    if getattr(model, "peft_config", None):
        raise ValueError(
            "the model has adapters, which train by themselves and would be frozen here; salient tuning "
            "takes the model without them"
        )
    rounding = next((name for name, one in svdq_layers(model) if isinstance(one, SVDQIntegerLinear)), None)
    if rounding is not None:
        raise ValueError(f"{rounding}: {NO_GRADIENT}")
    kinds = {"salient": salient, "biases": biases, "norms": norms, "head": head}
    counts = {kind: 0 for kind, chosen in kinds.items() if chosen}
    chosen = [(kind, p) for kind, p in _kinds(model) if kind in counts]
    if not any(parameter.numel() for _, parameter in chosen):
        raise ValueError(
            f"nothing would train: the model has no parameters of the kinds {list(counts)}; "
            f"there are {sorted({kind for kind, p in _kinds(model) if kind and p.numel()})} "
            "(a config with k=0 has no salient weights)"
        )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for kind, parameter in chosen:
        parameter.requires_grad_(True)
        counts[kind] += parameter.numel()
    result = Trainable(counts, number_of_weights(model) - sum(counts.values()))
    if show:
        Console().print(result)
    return result


def _kinds(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Each parameter once, with its kind; the kind is "" where none of the four applies."""
    base = getattr(model, "base_model", model)
    inside = {id(parameter) for parameter in base.parameters()}
    inside -= {id(parameter) for name in heads(model) for parameter in model.get_submodule(name).parameters()}
    output = getattr(model, "get_output_embeddings", lambda: None)()
    vocabulary = {id(parameter) for parameter in output.parameters()} if output is not None else set()
    seen: set[int] = set()
    for module in model.modules():
        norm = "norm" in type(module).__name__.lower()
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            float_ = parameter.is_floating_point()
            yield _kind(name, norm, outside=float_ and id(parameter) not in inside | vocabulary), parameter


def _kind(name: str, norm: bool, *, outside: bool) -> str:
    if is_salient_values(name):
        return "salient"
    if outside:
        return "head"
    if name == "bias" or (name.endswith("_bias") and name not in ROUTING):
        return "biases"
    return "norms" if norm else ""
