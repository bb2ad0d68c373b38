"""Tiny random models of many families, their inputs, and how two models are compared.

Builders only, no fixtures: a test imports what it needs. Every family has two layers, a hidden width of
64 (one block of codes) and an inner width of 96 (a block and a half).
"""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import transformers as hf
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from svdq_hf import SVDQLinear

VOCABULARY, HIDDEN, INNER = 96, 64, 96

LOUD = 4.0
"""Factor on the layers' weights. A fresh model is nearly its embeddings alone (BERT without its layers
keeps a cosine of 0.998 to itself), so nothing that happens to its layers would show in its output."""

_ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_DECODER = {**_ENCODER, **_TOKENS, "num_key_value_heads": 2, "head_dim": 16}
_PICTURE = {
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}
_TWO_STACKS = {
    "vocab_size": VOCABULARY,
    "d_model": HIDDEN,
    **{f"{stack}_layers": 2 for stack in ("encoder", "decoder")},
    **{f"{stack}_ffn_dim": INNER for stack in ("encoder", "decoder")},
    **{f"{stack}_attention_heads": 4 for stack in ("encoder", "decoder")},
}


# Configs that more than one test needs.


def bert_config(**choices: Any) -> hf.BertConfig:
    return hf.BertConfig(**{**_ENCODER, **choices})


def llama_config(**choices: Any) -> hf.LlamaConfig:
    return hf.LlamaConfig(**{**_DECODER, **choices})


def mixtral_config(**choices: Any) -> hf.MixtralConfig:
    return hf.MixtralConfig(**{**_DECODER, "num_local_experts": 4, "num_experts_per_tok": 2, **choices})


def clip_config() -> hf.CLIPConfig:
    return hf.CLIPConfig(text_config={**_ENCODER, **_TOKENS}, vision_config=_PICTURE, projection_dim=32)


def dinov2_config(**choices: Any) -> hf.Dinov2Config:
    """With the SwiGLU layer, two layers of which share one tensor in files."""
    sizes = {name: value for name, value in _PICTURE.items() if name != "intermediate_size"}
    return hf.Dinov2Config(**{**sizes, "use_swiglu_ffn": True, "mlp_ratio": 2, **choices})


# Models.


def _seeded(model: type[hf.PreTrainedModel], config: hf.PreTrainedConfig) -> hf.PreTrainedModel:
    torch.manual_seed(0)
    return model(config).eval()


def bert(**choices: Any) -> hf.PreTrainedModel:
    return _seeded(hf.BertModel, bert_config(**choices))


def classifier(**choices: Any) -> hf.PreTrainedModel:
    return _seeded(hf.BertForSequenceClassification, bert_config(num_labels=3, **choices))


def llama(**choices: Any) -> hf.PreTrainedModel:
    return _seeded(hf.LlamaForCausalLM, llama_config(**choices))


def clip() -> hf.PreTrainedModel:
    return _seeded(hf.CLIPModel, clip_config())


def mixtral() -> hf.PreTrainedModel:
    return _seeded(hf.MixtralForCausalLM, mixtral_config())


def dinov2() -> hf.PreTrainedModel:
    return _seeded(hf.Dinov2Model, dinov2_config())


def molmo2_text() -> hf.PreTrainedModel:
    """Its q, k and v, of different heights, share one tensor in files."""
    from transformers.models.molmo2 import Molmo2TextConfig, Molmo2TextModel

    return _seeded(Molmo2TextModel, Molmo2TextConfig(**_DECODER, additional_vocab_size=4))


def deberta1() -> hf.PreTrainedModel:
    """The first DeBERTa changes the output of a linear layer in place."""
    relative = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 8}
    return _seeded(hf.DebertaModel, hf.DebertaConfig(**_ENCODER, **relative))


def _distilbert() -> hf.PreTrainedModel:
    sizes = {"dim": HIDDEN, "hidden_dim": INNER, "n_layers": 2, "n_heads": 4}
    config = hf.DistilBertConfig(vocab_size=VOCABULARY, max_position_embeddings=40, **sizes)
    return _seeded(hf.DistilBertModel, config)


def _deberta() -> hf.PreTrainedModel:
    relative = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8}
    return _seeded(hf.DebertaV2Model, hf.DebertaV2Config(**_ENCODER, **relative))


def _gpt2() -> hf.PreTrainedModel:
    sizes = {"n_embd": HIDDEN, "n_inner": INNER, "n_layer": 2, "n_head": 4, "n_positions": 40}
    config = hf.GPT2Config(vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2, **sizes)
    return _seeded(hf.GPT2LMHeadModel, config)


def _opt() -> hf.PreTrainedModel:
    sizes = {name: value for name, value in _ENCODER.items() if name != "intermediate_size"}
    config = hf.OPTConfig(**sizes, **_TOKENS, ffn_dim=INNER, word_embed_proj_dim=32)
    return _seeded(hf.OPTForCausalLM, config)


def t5() -> hf.PreTrainedModel:
    sizes = {"d_model": HIDDEN, "d_kv": 16, "d_ff": INNER, "num_layers": 2, "num_heads": 4}
    config = hf.T5Config(vocab_size=VOCABULARY, decoder_start_token_id=0, **sizes)
    return _seeded(hf.T5ForConditionalGeneration, config)


def _bart() -> hf.PreTrainedModel:
    config = hf.BartConfig(**_TWO_STACKS, max_position_embeddings=40, forced_eos_token_id=2)
    return _seeded(hf.BartForConditionalGeneration, config)


def _whisper() -> hf.PreTrainedModel:
    sizes = {"num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 20}
    special = {**_TOKENS, "decoder_start_token_id": 1, "suppress_tokens": None, "begin_suppress_tokens": None}
    return _seeded(hf.WhisperForConditionalGeneration, hf.WhisperConfig(**_TWO_STACKS, **sizes, **special))


# Inputs.


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


def tokens(batch: int = 2, length: int = 9) -> Tensor:
    """Token numbers `[batch, length]`, none of them special."""
    return torch.randint(4, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(7))


def text() -> dict[str, Tensor]:
    return {"input_ids": tokens(), "attention_mask": torch.ones(2, 9, dtype=torch.long)}


def pictures() -> dict[str, Tensor]:
    return {"pixel_values": _random(2, 3, 16, 16)}


def _text_to_text() -> dict[str, Tensor]:
    return {"input_ids": tokens(), "decoder_input_ids": tokens()[:, :5]}


def _sound() -> dict[str, Tensor]:
    return {"input_features": _random(2, 8, 20), "decoder_input_ids": tokens()[:, :5]}


def _text_and_pictures() -> dict[str, Tensor]:
    return {**text(), **pictures()}


# Families.


class Family(NamedTuple):
    """A model, what to call it with, and which of its linear layers are quantized and which are not.

    quantized, dense: how many there are, by short name (the path behind the last number).
    """

    build: Callable[[], hf.PreTrainedModel]
    inputs: Callable[[], dict[str, Tensor]]
    quantized: dict[str, int]
    dense: dict[str, int]
    loud: float = LOUD

    def loud_model(self) -> hf.PreTrainedModel:
        """The model with its quantized layers' weights made large: see `LOUD`."""
        model = self.build()
        with torch.no_grad():
            for name, module in model.named_modules():
                if isinstance(module, LINEAR) and short_name(name) in self.quantized:
                    module.weight *= self.loud
        return model


LINEAR = (nn.Linear, Conv1D)


def _each(count: int, *names: str) -> dict[str, int]:
    return dict.fromkeys(names, count)


_BERT_LAYERS = {
    **_each(2, "attention.self.query", "attention.self.key", "attention.self.value"),
    **_each(2, "attention.output.dense", "intermediate.dense", "output.dense"),
}
_LLAMA_LAYERS = {
    **_each(2, "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    **_each(2, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
}
_SELF_ATTENTION = [f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")]
_CROSS_ATTENTION = [f"encoder_attn.{name}_proj" for name in ("q", "k", "v", "out")]
_BART_LAYERS = {**_each(4, *_SELF_ATTENTION, "fc1", "fc2"), **_each(2, *_CROSS_ATTENTION)}

FAMILIES = {
    "bert": Family(bert, text, {**_BERT_LAYERS, "pooler.dense": 1}, {}),
    "distilbert": Family(
        _distilbert,
        text,
        _each(2, *(f"attention.{name}_lin" for name in ("q", "k", "v", "out")), "ffn.lin1", "ffn.lin2"),
        {},
    ),
    "roberta": Family(
        lambda: _seeded(hf.RobertaModel, hf.RobertaConfig(**_ENCODER)),
        text,
        {**_BERT_LAYERS, "pooler.dense": 1},
        {},
    ),
    "albert": Family(  # its two layers are one
        lambda: _seeded(hf.AlbertModel, hf.AlbertConfig(**_ENCODER, embedding_size=32)),
        text,
        {
            **_each(1, "encoder.embedding_hidden_mapping_in", "attention.query", "attention.key"),
            **_each(1, "attention.value", "attention.dense", "ffn", "ffn_output", "pooler"),
        },
        {},
    ),
    "deberta-v2": Family(
        _deberta,
        text,
        {
            **_each(2, *(f"attention.self.{name}_proj" for name in ("query", "key", "value"))),
            **_each(2, *(f"attention.self.pos_{name}_proj" for name in ("query", "key"))),
            **_each(2, "attention.output.dense", "intermediate.dense", "output.dense"),
        },
        {},
    ),
    "gpt2": Family(
        _gpt2, text, _each(2, "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"), {"lm_head": 1}
    ),
    "opt": Family(
        _opt,
        text,
        {
            **_each(2, *_SELF_ATTENTION, "fc1", "fc2"),
            **_each(1, "model.decoder.project_in", "model.decoder.project_out"),
        },
        {"lm_head": 1},
    ),
    "llama-tied": Family(lambda: llama(tie_word_embeddings=True), text, _LLAMA_LAYERS, {"lm_head": 1}),
    "llama-untied": Family(llama, text, _LLAMA_LAYERS, {"lm_head": 1}),
    "qwen3": Family(
        lambda: _seeded(hf.Qwen3ForCausalLM, hf.Qwen3Config(**_DECODER)), text, _LLAMA_LAYERS, {"lm_head": 1}
    ),
    "gemma3": Family(
        lambda: _seeded(hf.Gemma3ForCausalLM, hf.Gemma3TextConfig(**_DECODER, sliding_window=8)),
        text,
        _LLAMA_LAYERS,
        {"lm_head": 1},
    ),
    "t5": Family(
        t5,
        _text_to_text,
        {
            **_each(4, *(f"SelfAttention.{name}" for name in "qkvo"), "DenseReluDense.wi"),
            **_each(2, *(f"EncDecAttention.{name}" for name in "qkvo")),
        },
        {"DenseReluDense.wo": 4, "lm_head": 1},
        loud=1.0,  # T5 does not scale its attention: at 4, softmax is an argmax and amplifies any change
    ),
    "bart": Family(_bart, _text_to_text, _BART_LAYERS, {"lm_head": 1}),
    "whisper": Family(_whisper, _sound, _BART_LAYERS, {"proj_out": 1}),
    "vit": Family(
        lambda: _seeded(hf.ViTModel, hf.ViTConfig(**_PICTURE)),
        pictures,
        {
            **_each(2, *(f"attention.{name}_proj" for name in "qkvo"), "mlp.fc1", "mlp.fc2"),
            "pooler.dense": 1,
        },
        {},
    ),
    "clip": Family(
        clip,
        _text_and_pictures,
        {
            **_each(4, *_SELF_ATTENTION, "mlp.fc1", "mlp.fc2"),
            **_each(1, "text_projection", "visual_projection"),
        },
        {},
    ),
}


# Comparisons.


def short_name(path: str) -> str:
    """The path of a module behind its last number: `encoder.layer.0.output.dense` -> `output.dense`."""
    parts = path.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[numbers[-1] + 1 :]) if numbers else path


def short_names(model: nn.Module, kinds: type | tuple[type, ...] = SVDQLinear) -> dict[str, int]:
    """How many modules of these kinds a model has, by short name."""
    names = [short_name(name) for name, module in model.named_modules() if isinstance(module, kinds)]
    return dict(Counter(names))


def outputs(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Every number that a model answers with, as one vector."""
    with torch.no_grad():
        return torch.cat([tensor.flatten().float() for tensor in _tensors(model(**inputs))])


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | tuple | list | hf.Cache):
        members = value.values() if isinstance(value, dict) else () if isinstance(value, hf.Cache) else value
        for member in members:
            yield from _tensors(member)


def cosine(one: Tensor, other: Tensor) -> float:
    """Of two vectors; what is not a number (CLIP divides by its own length) counts as zero."""
    one, other = (vector.detach().nan_to_num() for vector in (one, other))
    return float(torch.nn.functional.cosine_similarity(one, other, dim=0))


def different_tensors(one: nn.Module, other: nn.Module) -> list[str]:
    """Names of stored tensors that are not the same in both, bit for bit and in dtype."""
    ours, theirs = one.state_dict(), other.state_dict()
    return [
        name
        for name in sorted(ours.keys() | theirs.keys())
        if name not in ours
        or name not in theirs
        or ours[name].dtype != theirs[name].dtype
        or not torch.equal(ours[name], theirs[name])
    ]


def problems(loading_info: dict[str, Any]) -> dict[str, Any]:
    """What `output_loading_info=True` reports, without the empty entries."""
    return {kind: found for kind, found in loading_info.items() if found}
