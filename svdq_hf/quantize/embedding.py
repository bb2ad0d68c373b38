"""The input embedding, quantized on request: each row is looked up in its packed parts.

Only where it is a matrix by itself: one that is tied to the output head is quantized with the head
(`quantize.head`). Position and type embeddings are small, and stay dense.
"""

from collections.abc import Container
from dataclasses import dataclass

from torch import nn

from svdq_hf.config import SVDQConfig
from svdq_hf.nn.embedding import SVDQEmbedding, can_be_read
from svdq_hf.quantize.code_inspection import layers_read
from svdq_hf.quantize.head import Head, put_head
from svdq_hf.quantize.kept_dense import KeptDense
from svdq_hf.quantize.weight import check_weight, quantize_weight


@dataclass(frozen=True)
class Embedding(Head):
    """An input embedding, and the embeddings that are the same matrix."""

    module: nn.Embedding


def find_embedding(model: nn.Module, stored: Container[str] = ()) -> Embedding:
    """The input embedding of a transformers model, and the embeddings that are the same matrix.

    Args:
        model: the model.
        stored: names of tensors in a checkpoint: an embedding that has a tensor there is not tied.

    Raises:
        ValueError: there is none, it does more than look rows up, or it is tied to the output head.
    """
    table = input_embedding(model)
    if table is None or not can_be_read(table):
        found = "missing" if table is None else f"a {type(table).__name__}, which cannot be packed"
        raise ValueError(
            f"embeddings=True: the input embedding of {type(model).__name__} is {found}; leave embeddings out"
        )
    names = [name for name, module in model.named_modules() if module is table]
    tied = {}
    for name, module in model.named_modules():
        shares = getattr(module, "weight", None) is table.weight or _is_tied(model, name, names[0])
        if module is table or not shares or f"{name}.weight" in stored:
            continue
        if not can_be_read(module):
            raise ValueError(
                f"embeddings=True: {names[0]} and {name} are one matrix: lm_head=True quantizes both. (A "
                "checkpoint whose embedding alone is packed loads without the head: AutoModel)"
            )
        tied[name] = module
    return Embedding(names[0], table, tied)


def chosen_embedding(model: nn.Module, config: SVDQConfig, head: Head | None) -> Embedding | None:
    """The input embedding of a dense model that is to be quantized, checked.

    Args:
        model: the dense model.
        config: how it is quantized.
        head: its output head, where that is quantized.

    Returns:
        The embedding; None where the config keeps it dense, or it is tied to a quantized head.

    Raises:
        ValueError: see `find_embedding`; or modules_to_not_convert matches it, the model's own code reads its
            weight, or that has a NaN.
    """
    if not config.embeddings or reads_head(model, head):
        return None
    table = find_embedding(model)
    for name in (table.name, *table.embeddings):
        if KeptDense.of(config).keeps(name):
            raise ValueError(f"embeddings=True, and modules_to_not_convert keeps {name} dense: which is it?")
    if table.name in layers_read(model, lambda module: module is table.module):
        raise ValueError(
            f"embeddings=True: the code of {type(model).__name__} reads the weight of {table.name} itself, "
            "and a packed one is no matrix; leave embeddings out"
        )
    if not table.module.weight.is_meta:
        check_weight(table.name, table.module.weight)
    return table


def input_table(model: nn.Module, config: SVDQConfig) -> dict[str, nn.Module]:
    """The input embedding by name, where the config quantizes it and it can be packed; else empty."""
    table = input_embedding(model) if config.embeddings else None
    if table is None or not can_be_read(table):
        return {}
    return {name: module for name, module in model.named_modules() if module is table}


def reads_head(model: nn.Module, head: Head | None) -> bool:
    """Whether the input embedding reads the rows of a quantized output head."""
    if head is None:
        return False
    table = input_embedding(model)
    names = [name for name, module in model.named_modules() if module is table]
    return any(name in head.embeddings or _is_tied(model, name, head.name) for name in names)


def _is_tied(model: nn.Module, one: str, other: str) -> bool:
    """Whether transformers ties the weights of two modules; before loading it knows ties by name only."""
    sources = getattr(model, "all_tied_weights_keys", None) or {}
    first, second = (sources.get(f"{name}.weight", f"{name}.weight") for name in (one, other))
    return bool(first == second)


def input_embedding(model: nn.Module) -> nn.Module | None:
    """The input embedding of a model; None where it has none."""
    try:
        return getattr(model, "get_input_embeddings", lambda: None)()
    except NotImplementedError:  # of models with several, such as CLIP
        return None


def put_empty_embedding(model: nn.Module, table: Embedding, config: SVDQConfig) -> SVDQEmbedding:
    """Put an empty SVDQEmbedding, on the meta device, in place of an input embedding.

    Args:
        model: changed in place.
        table: its input embedding.
        config: how it is quantized.
    """
    empty = SVDQEmbedding(table.module, config.of_layer(table.name).scheme, "meta")
    put_head(model, table, empty.train(table.module.training))
    return empty


def quantize_embedding(model: nn.Module, table: Embedding, config: SVDQConfig) -> None:
    """Quantize the input embedding of a model that is in memory, in place.

    Args:
        model: changed in place.
        table: its input embedding, as `chosen_embedding` found it.
        config: how it is quantized.

    Raises:
        ValueError: see `quantize_weight`.
    """
    parts, facts = quantize_weight(table.module.weight.detach(), config.without_data(), table.name)
    layer = put_empty_embedding(model, table, config)
    layer.load_parts(parts)
    layer.facts = facts
