"""The output head, quantized on request: in a small model it is most of the bytes that a token costs.

Where the head and the embedding are one matrix, it is stored once, packed, and the embedding reads its rows
from there. Not here: which other layers are quantized (`quantize.selection`), and loading
(`integrations.transformers`).
"""

from collections.abc import Container
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from svdq_hf.config import SVDQConfig
from svdq_hf.nn.embedding import TiedEmbedding, can_be_read
from svdq_hf.nn.inventory import svdq_layers
from svdq_hf.nn.linear import SVDQLinear
from svdq_hf.quantize.code_inspection import layers_read
from svdq_hf.quantize.kept_dense import KeptDense
from svdq_hf.quantize.layer import dense_layer, quantized_layer
from svdq_hf.quantize.weight import check_weight


@dataclass(frozen=True)
class Head:
    """An output head, and the embeddings tied to it.

    Attributes:
        name: of the head's module.
        module: the head.
        embeddings: modules that share its matrix, by name.
    """

    name: str
    module: nn.Linear | nn.Embedding
    embeddings: dict[str, nn.Embedding]


def find_head(model: nn.Module, stored: Container[str] | None = None) -> Head:
    """The output head of a transformers model, and the embeddings tied to it.

    Args:
        model: the model.
        stored: names of tensors in the checkpoint that `model` is being loaded from: an embedding of the
            head's shape without a tensor there is tied to it. None: an embedding that shares the head's
            tensor is.

    Raises:
        ValueError: there is no head that is a plain linear layer, or something tied to it is no embedding
            that can read packed rows.
    """
    output = getattr(model, "get_output_embeddings", lambda: None)()
    if output is None and stored is not None:
        classes = getattr(getattr(model, "config", None), "architectures", None)
        raise ValueError(
            f"{type(model).__name__} has no output head, and this checkpoint keeps its embedding in the "
            f"packed one: load the model with its head ({' or '.join(classes or ['AutoModelForCausalLM'])})"
        )
    if type(output) is not nn.Linear:
        found = "" if output is None else f": its output layer is a {type(output).__name__}"
        raise ValueError(
            f"lm_head=True: {type(model).__name__} has no output head over a vocabulary to quantize{found}; "
            "leave lm_head out, or load the model with one (AutoModelForCausalLM, AutoModelForMaskedLM)"
        )
    name = next(name for name, module in model.named_modules() if module is output)
    return Head(name, output, _ties(model, output, stored))


def tied_now(model: nn.Module, head: Head) -> Head:
    """A head found before its model's weights were loaded, with the embeddings that are tied to it now.

    Args:
        model: the loaded model.
        head: as it was found.

    Raises:
        ValueError: something tied to it is no embedding that can read packed rows.
    """
    return Head(head.name, head.module, _ties(model, head.module, None))


def _ties(model: nn.Module, output: nn.Module, stored: Container[str] | None) -> dict[str, nn.Embedding]:
    """The embeddings, by name, that are one matrix with the output head; `stored` as in `find_head`."""
    tied: dict[str, nn.Embedding] = {}
    for name, module in model.named_modules():
        if module is output or not _is_tied(name, module, output, stored):
            continue
        if not can_be_read(module):
            raise ValueError(
                f"lm_head=True: {name} shares the head's weight and is a {type(module).__name__}, which "
                "cannot read packed rows; leave lm_head out"
            )
        tied[name] = module
    return tied


def _is_tied(name: str, module: nn.Module, output: nn.Module, stored: Container[str] | None) -> bool:
    if stored is None:
        return getattr(module, "weight", None) is output.weight
    same = isinstance(module, nn.Embedding) and module.weight.shape == output.weight.shape
    return same and f"{name}.weight" not in stored


def chosen_head(model: nn.Module, config: SVDQConfig) -> Head:
    """The output head of a dense model, checked: nothing about it can stop the quantization later.

    Args:
        model: the dense model.
        config: how it is quantized.

    Raises:
        ValueError: see `find_head`; or modules_to_not_convert matches the head, the model's own code reads
            its weight, or that has a NaN.
    """
    head = find_head(model)
    if head.name in layers_read(model):
        raise ValueError(
            f"lm_head=True: the code of {type(model).__name__} reads the weight of {head.name} itself, and a "
            "packed one is no matrix; leave lm_head out"
        )
    for name in (head.name, *head.embeddings):  # one matrix, by all its names
        if KeptDense.of(config).keeps(name):
            raise ValueError(f"lm_head=True, and modules_to_not_convert keeps {name} dense: which is it?")
    if not head.module.weight.is_meta:
        check_weight(head.name, head.module.weight)
    return head


def put_head(model: nn.Module, head: Head, layer: SVDQLinear) -> None:
    """Put a quantized layer, filled or empty, in place of the head; tied embeddings then read its rows.

    Args:
        model: changed in place.
        head: its head.
        layer: the quantized head.
    """
    for name, module in head.embeddings.items():
        model.set_submodule(name, TiedEmbedding(layer, module).train(module.training))
    model.set_submodule(head.name, layer)
    if head.embeddings:
        _untie(model, {head.name, *head.embeddings})


def quantize_head(model: nn.Module, head: Head, config: SVDQConfig) -> None:
    """Quantize the output head of a model that is in memory, in place.

    Args:
        model: the model; changed in place.
        head: as `chosen_head` found it.
        config: how it is quantized.

    Raises:
        ValueError: see `quantize_weight`.
    """
    layer = quantized_layer(head.name, head.module, config.without_data())
    if layer.bias is not None and head.embeddings:  # it may be tied too: a tensor of its own from now on
        layer.bias = nn.Parameter(layer.bias.detach().clone(), layer.bias.requires_grad)
    put_head(model, head, layer)


def restore_head(model: nn.Module, dtype: torch.dtype) -> None:
    """Make a quantized head that embeddings read from dense, and tie them again; other heads stay.

    Args:
        model: changed in place.
        dtype: of the dense weight.
    """
    readers = {name: module for name, module in model.named_modules() if isinstance(module, TiedEmbedding)}
    for name, layer in list(svdq_layers(model)):
        mine = {place: reader for place, reader in readers.items() if reader.head is layer}
        if mine:
            dense = dense_layer(layer, dtype)
            model.set_submodule(name, dense)
            for place, reader in mine.items():
                model.set_submodule(place, reader.restored(dense.weight))  # type: ignore[arg-type]
    if readers:
        for module in model.modules():
            module.__dict__.pop("_tied_weights_keys", None)
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)  # type: ignore[operator]
        model.tie_weights()  # type: ignore[operator]


def dense_names(model: Any, name: str) -> list[str]:
    """Names of tensors in a dense checkpoint from which a layer's weight may be loaded, its ties included.

    Args:
        model: the model.
        name: of the layer.
    """
    tied = [{target, source} for target, source in (model.all_tied_weights_keys or {}).items()]
    weight = f"{name}.weight"
    return sorted({weight}.union(*(pair for pair in tied if weight in pair)))


def _untie(model: Any, modules: Container[str]) -> None:
    """Remove transformers' ties of these modules; the config still says that the dense model is tied.

    (Some families scale what goes into a tied head, and look into the config for it.)
    """
    ties = model.all_tied_weights_keys.items()
    kept = {one: other for one, other in ties if _owner(one) not in modules and _owner(other) not in modules}
    for module in model.modules():
        if getattr(module, "_tied_weights_keys", None):
            module._tied_weights_keys = None
    model._tied_weights_keys = kept or None
    model.all_tied_weights_keys = kept


def _owner(tensor: str) -> str:
    return tensor.rpartition(".")[0]
