"""Synthetic calibration batches: text that a causal model writes itself; random tokens for other models.

Error feedback needs to know which inputs of a layer are large and which vary together. For an encoder, random
tokens tell most of that; for a causal model hardly any, but text of its own does (measured), which is the
idea of LLM-QAT (Liu et al. 2023, arXiv 2305.17888), called self-calibration where a model is only quantized
(Williams et al. 2024, arXiv 2410.17170). Not here: the statistics of the inputs
(`calibration.inputs`).
"""

from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, StoppingCriteria
from transformers.utils import logging as hf_logging

from svdq_hf.calibration.inputs import evaluating, writes

TOKENS = 8192
"""Tokens of all batches together."""

OWN_WORDS, RANDOM_TOKENS = 128, 64
"""Tokens of a text, written or random: too few show only how texts begin, more cost time."""

BATCH_TOKENS = 512
"""About so many tokens are a batch: with a large vocabulary, its logits outgrow a small model's weights."""


def synthetic_batches(model: nn.Module, *, tokens: int = TOKENS, seed: int = 0) -> list[dict[str, Tensor]]:
    """Batches for `quantize_model`, made without data.

    A causal language model samples them, at temperature 1 from its first token on, which takes as long as
    `model.generate` does. Other models that read tokens get ids drawn evenly from the vocabulary.

    Args:
        model: a dense transformers model.
        tokens: about how many in all.
        seed: of sampling and drawing.

    Returns:
        Batches of keyword arguments, token ids `[rows, length]`, int64, on the model's device.

    Raises:
        ValueError: the model does not read token ids (it sees pictures, hears sound, or is no
            transformers model).

    Source: LLM-QAT, arXiv 2305.17888; self-calibration, arXiv 2410.17170.
    """
    text = _text_config(model)
    vocabulary = getattr(text, "vocab_size", None)
    if not isinstance(vocabulary, int) or getattr(model, "main_input_name", "") != "input_ids":
        raise ValueError(
            f"{type(model).__name__} reads no token ids, so no batches can be made for it: call "
            "quantize_model(model, config, batches) with batches of your own and error_feedback=True"
        )
    generator = torch.Generator().manual_seed(seed)  # on the CPU: the same tokens for every device
    device = _device_of(model)
    most = getattr(text, "max_position_embeddings", None) or tokens
    own = writes(model)
    length = min(OWN_WORDS if own else RANDOM_TOKENS, most, tokens)
    ids = torch.randint(vocabulary, (-(-tokens // length), length), generator=generator).to(device)
    if own:
        ids = _own_words(model, ids, getattr(text, "bos_token_id", None), seed)
    names = ["input_ids"]
    if getattr(model.config, "is_encoder_decoder", False):
        names.append("decoder_input_ids")
    count = -(-ids.numel() // max(BATCH_TOKENS, length))
    return [dict.fromkeys(names, part) for part in torch.tensor_split(ids, count)]


def _device_of(model: nn.Module) -> torch.device:
    """The device on which a model computes: that of its first weight that is not offloaded to "meta".

    Buffers count: a model may have no parameter at all.
    """
    return next((one.device for one in chain(model.parameters(), model.buffers()) if not one.is_meta), CPU)


CPU = torch.device("cpu")


def _text_config(model: nn.Module) -> Any:
    """The config of the part that reads tokens; None where there is no config."""
    config = getattr(model, "config", None)
    get = getattr(config, "get_text_config", None)
    return get() if callable(get) else config


def _own_words(model: Any, random: Tensor, first: int | None, seed: int) -> Tensor:
    """Texts that the model writes, token ids of the shape of `random` `[rows, length]`.

    first: the token that each text begins with; None: the first column of `random`.
    """
    length = random.shape[1]
    start = random[:, :1] if first is None else torch.full_like(random[:, :1], first)
    with torch.random.fork_rng(), evaluating(model):
        torch.manual_seed(seed)
        # The model's own generation config may have penalties.
        bar = hf_logging.tqdm(total=length - 1, desc="Writing calibration text", unit="token")
        own, model.generation_config = model.generation_config, GenerationConfig()
        try:
            written: Tensor = model.generate(
                input_ids=start,
                attention_mask=torch.ones_like(start),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                min_new_tokens=length - 1,
                max_new_tokens=length - 1,
                pad_token_id=0,
                stopping_criteria=[_counter(bar)],
            )
        finally:
            model.generation_config = own
            bar.close()
    return written


def _counter(bar: Any) -> StoppingCriteria:
    """A stopping criterion that never stops, and advances a bar with each token."""

    class Counter(StoppingCriteria):  # type: ignore[misc]  # transformers ships no types
        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            bar.update()
            return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    return Counter()
