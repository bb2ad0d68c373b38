"""Which block type each tensor gets: the mixture of llama.cpp's own IQ4_NL files, byte for byte as large.

Most matrices are IQ4_NL. What costs quality most has more bits: the output (or the embedding that it is tied
to), the values where four or more heads share them, and the first eighth of ffn_down. Where llama.cpp takes
Q5_K, this takes Q5_0, of 5.5 bits as well. Source: llama_tensor_get_type_impl in llama-quant.cpp. Not here:
how a type rounds (`integrations.gguf.block_types`).
"""

import re

from svdq_hf.integrations.gguf.block_types import IQ4_NL, Q5_0, Q6_K, Q8_0, BlockType
from svdq_hf.integrations.gguf.model_file import ModelFile

EMBEDDING, OUTPUT = "token_embd.weight", "output.weight"

QUANTIZED = re.compile(
    r"blk\.(?P<layer>\d+)\."
    r"(?P<what>attn_(q|k|v|qkv|output|q_a|q_b|kv_a_mqa|kv_b)|ffn_(gate|up|down)(_exps|_shexp)?|ssm_(in|out))"
    r"\.weight"
)
"""Matrices of a layer that a large share of a model's weights is in; others stay as they are."""

SHARED_HEADS = 4
"""Query heads for each head of keys and values, from which on values get more bits."""

FIRST_DOWN = 8
"""The first layers / 8 get more bits for ffn_down."""


def block_type(model: ModelFile, name: str) -> BlockType | None:
    """The block type of a tensor.

    Args:
        model: whose tensor it is.
        name: of the tensor.

    Returns:
        None for a tensor that stays as it is: a vector, a router, a kind that is not known, or rows that
        are no multiple of 32.
    """
    shape = model.shape(name)
    if len(shape) < 2 or shape[-1] % 32:
        return None
    if name == OUTPUT or (name == EMBEDDING and OUTPUT not in model.tensors):
        return Q6_K if shape[-1] % Q6_K.columns == 0 and model.architecture != "falcon" else Q8_0
    if name == EMBEDDING:
        return IQ4_NL
    found = QUANTIZED.fullmatch(name)
    return _of_layer(model, int(found["layer"]), found["what"]) if found else None


def _of_layer(model: ModelFile, layer: int, what: str) -> BlockType:
    """The block type of a matrix of a layer."""
    eight_experts = model.first_count("expert_count") == 8
    if what in ("attn_v", "attn_qkv", "attn_kv_b", "attn_k") and eight_experts:
        return Q8_0
    if what in ("attn_v", "attn_qkv", "attn_kv_b") and _heads_per_value(model) >= SHARED_HEADS:
        return Q5_0
    if what.startswith("ffn_down") and layer < model.first_count("block_count") // FIRST_DOWN:
        return Q5_0
    return Q5_0 if what == "attn_output" and eight_experts else IQ4_NL


def _heads_per_value(model: ModelFile) -> int:
    heads = model.first_count("attention.head_count")
    return heads // max(1, model.first_count("attention.head_count_kv", heads))
