"""Patches of transformers (5.20 to 5.24): every change that svdq_hf makes to it, and why.

Of PreTrainedModel, so for the whole process, made with the first SVDQHfQuantizer (`apply`):

PreTrainedModel.dtype
    Why: it is the first floating parameter's; config.json is written and models are loaded by it. Where that
    is a salient weight, FP32, a bfloat16 model would come back in FP32. Since: 5.20, and before.
    Fails when not needed: `test_transformers_takes_a_salient_weight_for_the_models_dtype`.
PreTrainedModel.save_pretrained
    Why: a model is saved with the quantization_config that it has. Where a part of it was quantized by itself
    that is none, and what is saved cannot be loaded, or is wrong; a dense model that was made from a
    quantized one's config has that, and what is saved is refused. While it is saved it has the right one.
    Fails when not needed: `test_transformers_writes_a_dense_models_quantization_config`,
    `test_transformers_loads_packed_bytes_as_weights`.
PreTrainedModel.num_parameters
    Why: it counts the bytes of packed weights; bitsandbytes' 4 bits alone are known to it.
    Fails when not needed: `test_transformers_counts_packed_bytes`.
PreTrainedModel.resize_token_embeddings
    Why: it resizes the embedding and then finds that the head is no nn.Linear. The patch refuses before that.
    Fails when not needed: `test_transformers_resizes_half_of_a_model`.

Private attributes of one model:

_keep_in_fp32_modules_strict (`load_exactly`, while it loads)
    Why: salient weights are the checkpoint's own values, and transformers rounds a weight to the dtype asked
    for before it is quantized. Fails: `test_transformers_rounds_a_weight_before_it_is_quantized`.
_get_dtype_plan (`load_exactly`, while it loads)
    Why: before 5.23 a weight to quantize is loaded in the dtype of its packed bytes.
    Fails: nothing on 5.23 and later; the tests with the marker "oldest" on 5.20 without it.
_is_hf_initialized of tensors (`Load.note_packed`, `TiedEmbedding.weight`)
    Why: a family's initialisation reaches for weights by name, and would start packed ones anew
    where the loader has not marked them yet. On 5.24 no test fails without it; 5.20 is not tried without it.
_weight_conversions (`integrations.transformers.file_names`)
    Why: saving would join the packed parts of layers that are one tensor in a family's files; and a
    dequantized model must be saved as the family's files are.
    Fails: `test_transformers_joins_packed_parts_on_save`.
_tied_weights_keys, all_tied_weights_keys (`quantize.head`, of the model and its parts)
    Why: transformers would put the dense weight of an embedding into a packed head.
    Fails: `test_transformers_ties_what_is_packed`.
operations of a WeightConverter (`integrations.transformers.expert_conversions`, while it loads)
    Why: one dense tensor of all experts would be made before the first is quantized.
    Fails: `test_no_dense_stack_is_ever_made`.
is_quantized of a model and its parts (`integrations.transformers.in_memory`, by `_assign_is_quantized`)
    Why: `from_pretrained` alone sets it.

No upstream issue is known for any of them. Not here: PEFT (`integrations.peft.patches`).
"""

import functools
import re
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from svdq_hf.format.names import is_salient_values
from svdq_hf.integrations.transformers.saved_config import as_it_is
from svdq_hf.nn.embedding import SVDQEmbedding, TiedEmbedding
from svdq_hf.nn.inventory import packed_weights, uncounted_weights
from svdq_hf.nn.linear import SVDQLinear

OWN_DTYPE, OWN_SAVE, OWN_COUNT, OWN_RESIZE = (
    PreTrainedModel.dtype,
    PreTrainedModel.save_pretrained,
    PreTrainedModel.num_parameters,
    PreTrainedModel.resize_token_embeddings,
)
"""transformers' own versions of what is patched."""


@functools.cache
def apply() -> None:
    """Patch transformers' class, once; what others patch afterwards stays."""
    PreTrainedModel.dtype = property(main_dtype)
    PreTrainedModel.save_pretrained = save_as_it_is
    PreTrainedModel.num_parameters = count_weights
    PreTrainedModel.resize_token_embeddings = resize_dense_ends


def main_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of the model's first floating parameter that is not a salient weight.

    For a model without salient weights it is what transformers answers. A model with nothing else gets the
    dtype of its salient weights.

    Args:
        model: a model with a floating parameter.

    >>> values, scale = torch.ones(2), torch.ones(2, dtype=torch.bfloat16)
    >>> main_dtype(torch.nn.ParameterDict({"salient_values": values, "weight": scale}))
    torch.bfloat16
    """
    floating = ((name, one.dtype) for name, one in model.named_parameters() if one.is_floating_point())
    first = next(floating)
    return next((dtype for name, dtype in chain([first], floating) if not is_salient_values(name)), first[1])


@functools.wraps(OWN_SAVE)
def save_as_it_is(model: Any, *args: Any, **kwargs: Any) -> Any:
    """`save_pretrained`, by which a model says what it holds, dense or quantized, whoever's config it has.

    Raises:
        ValueError: no config can say that; see `as_it_is`.
    """
    with as_it_is(model):
        return OWN_SAVE(model, *args, **kwargs)


@functools.wraps(OWN_COUNT)
def count_weights(model: Any, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
    """`num_parameters`: as many as the dense model has, packed or not; of those that train, all that do."""
    total: int = OWN_COUNT(model, only_trainable, exclude_embeddings)
    tables = {id(one.weight) for one in packed_tables(model)} if exclude_embeddings else set()
    if not only_trainable:
        return total + uncounted_weights(model, without=tables)
    parts = [one.parts for one in packed_weights(model) if id(one.parts["weight"]) in tables]
    values = [part["salient_values"] for part in parts]
    return total - sum(one.numel() for one in values if one.requires_grad)


def packed_tables(model: nn.Module) -> list[SVDQLinear]:
    """The packed matrices whose rows are embeddings."""
    found = [module for module in model.modules() if isinstance(module, SVDQEmbedding)]
    return [*found, *(module.head for module in model.modules() if isinstance(module, TiedEmbedding))]


@functools.wraps(OWN_RESIZE)
def resize_dense_ends(
    model: Any,
    new_num_tokens: int | None = None,
    pad_to_multiple_of: int | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """`resize_token_embeddings` that refuses a packed head or embedding before it changes anything.

    Raises:
        ValueError: one of the two is packed, and the size differs.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    packed = isinstance(head, SVDQLinear) or isinstance(embedding, SVDQEmbedding | TiedEmbedding)
    if packed:
        rows = (
            embedding.weight.shape[0] if not isinstance(embedding, SVDQEmbedding) else embedding.out_features
        )
        size = rows if new_num_tokens is None else new_num_tokens
        size += -size % (pad_to_multiple_of or 1)
        if size != rows:
            raise ValueError(
                f"resize_token_embeddings: a quantized head or embedding has {rows} rows and cannot have "
                f"{size}; resize the dense model (dequantize_model(model) gives one) and quantize that"
            )
    return OWN_RESIZE(model, new_num_tokens, pad_to_multiple_of, *args, **kwargs)


def load_exactly(model: Any, weights: Iterable[str], exact: Iterable[str]) -> Callable[[], None]:
    """Have some tensors of a model loaded without rounding, for as long as it is loaded.

    Args:
        model: on the meta device.
        weights: names of packed weights: loaded in the requested dtype instead of that of packed bytes.
        exact: names of tensors that are loaded in FP32, whatever dtype is requested.

    Returns:
        A function that undoes it.
    """
    strict, plan = model._keep_in_fp32_modules_strict, model._get_dtype_plan
    asked = [_only(key) for key in weights]
    model._keep_in_fp32_modules_strict = set(strict or ()) | {_only(key) for key in exact}
    model._get_dtype_plan = lambda dtype: {**dict.fromkeys(asked, dtype), **plan(dtype)}

    def undo() -> None:
        model._keep_in_fp32_modules_strict = strict
        del model._get_dtype_plan  # its class has another

    return undo


def _only(key: str) -> str:
    return f"^{re.escape(key)}$"
