"""A tiny config of any model type that transformers knows, made from its defaults by attribute name.

A config's own defaults say which choices it has; here every choice that is a size is made small, in
nested configs too. What a config derives from other sizes (its default is None) it derives again.
"""

import dataclasses
import re
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY, HIDDEN, INNER, HEAD = 96, 64, 96, 16

KEPT = (
    "theta|temperature|rate|seed|stride|kernel|scale|weight|eps|factor|ratio|ignore|dilation|indice|idx"
    "|num_channels|pool_scales|padding"
)
"""Numbers that are no sizes, or small already."""

SIZES: list[tuple[str, int]] = [
    (r"num_kv_shared_layers", 0),
    (r"upsample_groups", HIDDEN),
    (r"num_\w*labels|num_labels|num_classes", 8),
    (r"\w*num_filters|n_filters", 8),
    (r"\w*vocab\w*|num_embeddings|num_embeds", VOCABULARY),
    (r"codebook_size|entry_length|num_codevectors_per_group", HIDDEN),  # some must be powers of 2
    (r"\w*(head_dim|head_size)\w*|d_kv|d_head|dim_head|kv_channels", HEAD),
    (r"\w*_rank", 32),
    (r"\w*(key_value|kv)_heads\w*", 2),
    (r"(\w*_)?n?(num_)?(attention_)?heads?|\w*_n?heads\w*|n_head", 4),
    (r"\w*experts_per_tok\w*|moe_top_?k|moe_k|top_?k_experts|num_selects", 2),
    (r"num_\w*expert_groups?|n_group|topk_group", 1),
    (r"num_shared_experts|n_shared_experts|first_k_dense_replace|num_dense_layers", 1),
    (r"(\w+_)?(num|n)_(\w+_)?experts\w*|zero_expert_num", 4),
    (r"(\w*_)?num_(\w+_)?(layers?|blocks|stages)|n_layers?|\w*_layers|layers|depth|num_block|\w*_depth", 2),
    (r"\w*(intermediate|ffn|feed_?forward|linear_units|mlp|inner)\w*|d_ff", INNER),
    (r"patch_size", 8),
    (r"(\w*_)?(image|img|input|crop|spec|resolution)_?(size|resolution)?", 32),
    (r"\w*max\w*position\w*|n_positions|\w*(context|seq|chunk)_(length|len|size)|max_seq_len|block_size", 64),
    (r"sliding_window\w*|window_size|attention_window|local_attention", 8),
    (r"num_\w*(queries|tokens|latents)|\w*_num_latents|n_latents", 8),
    (r"index_topk", 8),
    (r"prediction_length", 8),
    (
        r"\w*(hidden|embed|emb|proj|model|latent|channel|filter|output|out|in|dim|state|units|feature)\w*"
        r"|d_model|n_embd|\w*_size|\w*_width|width",
        HIDDEN,
    ),
]
"""Name of a choice (whole) -> the most that it may be."""

PER_STAGE = (
    r"\w*(hidden_sizes|channels\w*|conv_dim|dims?|embed_dims|widths|_sizes|channel_list|per_stage|tdnn_dim)"
)
"""Lists of widths, one for each stage of a pyramid: all are made smaller by one factor."""

_MAMBA_HEADS = {"mamba_n_heads": 8, "mamba_d_head": 16}  # twice the hidden width
_WINDOWS = {"num_windows": 4}
_SERIES = {"prediction_length": 8}
_ALL_HEADS = {"num_key_value_heads": 4}

SPECIAL: dict[str, dict[str, Any]] = {
    "granitemoehybrid": _MAMBA_HEADS,
    "bamba": {**_MAMBA_HEADS, "attn_layer_indices": [1]},
    **dict.fromkeys(("autoformer", "informer", "time_series_transformer"), _SERIES),
    **dict.fromkeys(("glm5_next_text", "dots3_note", "dots3_note_text", "nemotron"), _ALL_HEADS),
    **dict.fromkeys(("lw_detr", "lw_detr_vit"), _WINDOWS),
    "falcon_h1": {**_MAMBA_HEADS, "mamba_d_ssm": 2 * HIDDEN},
    "bit": {"num_groups": 4},
    "dac": {"encoder_hidden_size": 8, "decoder_hidden_size": 64},
    "esm": {"vocab_size": VOCABULARY, "pad_token_id": 1, "mask_token_id": 32},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "vitmatte": {"fusion_hidden_sizes": [64, 32, 16, 8]},
}
"""By model type, of the top config or a nested one: what the rules above do not get right."""


def tiny_config(model_type: str, kind: type[PreTrainedConfig] | None = None) -> PreTrainedConfig:
    """The tiny config of a model type; of its nested one of a kind, where a model wants only that."""
    config = _shrunk(CONFIG_MAPPING[model_type](), {})
    if kind is None or isinstance(config, kind):
        return config
    return next((inner for inner in nested(config) if isinstance(inner, kind)), config)


def nested(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    """All configs inside a config, outermost first."""
    inner = [value for value in vars(config).values() if isinstance(value, PreTrainedConfig)]
    return inner + [deeper for value in inner for deeper in nested(value)]


def _shrunk(config: PreTrainedConfig, ids: dict[int, int]) -> PreTrainedConfig:
    values, choices, aliases = vars(config), {}, config.attribute_map
    pyramid = isinstance(values.get("depths"), list | tuple)
    layers = 0 if pyramid else next((values[name] for name in _LAYERS if name in values), 0)
    for field in dataclasses.fields(config):
        name, value = field.name, values.get(aliases.get(field.name, field.name))
        if isinstance(value, PreTrainedConfig):
            choices[name] = _shrunk(value, ids)
        elif isinstance(value, list | tuple) and len(value) == layers > 2:
            choices[name] = type(value)(_small(name, value[place], ids) for place in (0, -1))
        elif value is not None and field.default is not None and name not in _INHERITED:
            choices[name] = _small(name, value, ids)
        elif name == "head_dim":
            choices[name] = HEAD
    if pyramid and isinstance(choices.get("embed_dim"), int):
        choices["embed_dim"] = HEAD
    if pyramid and isinstance(choices.get("window_size"), int):
        choices["window_size"] = 2
    return type(config)(**{**choices, **SPECIAL.get(config.model_type, {})})


_LAYERS = ("num_hidden_layers", "num_layers", "n_layers")
_INHERITED = {field.name for field in dataclasses.fields(PreTrainedConfig)} - {"vocab_size"}


def _small(name: str, value: Any, ids: dict[int, int]) -> Any:
    if re.search(r"token_(id|index)$|_ids?$", name):
        return _small_id(value, ids)
    if re.search(KEPT, name):
        return value
    if isinstance(value, list | tuple) and value and all(type(item) is int for item in value):
        return type(value)(_small_list(name, list(value)))
    if type(value) is not int:
        return value
    return next((min(value, most) for rule, most in SIZES if re.fullmatch(rule, name)), value)


def _small_list(name: str, values: list[int]) -> list[int]:
    if re.fullmatch(r"\w*depths|\w*blocks_per_stage|\w*num_blocks|num_block_repeats", name):
        return [min(value, 1) for value in values]
    if re.fullmatch(r"\w*heads\w*", name):
        return [2**place for place in range(len(values))] if len(set(values)) > 1 else [4] * len(values)
    if re.fullmatch(PER_STAGE, name) and max(values) > 2 * HIDDEN:
        return [
            value if value < 8 else max(8, value * 2 * HIDDEN // max(values) // 8 * 8) for value in values
        ]
    return values


def _small_id(value: Any, ids: dict[int, int]) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_small_id(item, ids) for item in value)
    if type(value) is not int or value < VOCABULARY - 32:
        return value
    return ids.setdefault(value, VOCABULARY - 1 - len(ids))
