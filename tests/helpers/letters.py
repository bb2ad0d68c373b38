"""A tokenizer of letters, real and tiny, and folders of tiny models that have it."""

from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tiny_models import bert_config, llama_config
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors

SPECIAL = ("[PAD]", "[BOS]", "[EOS]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,:;!?'\"()-\n"
QUICK = "The quick brown fox jumps over the lazy dog, and the dog looks on. Why does it not run away? "


def tokenizer(ends: bool = False, shift: int = 0) -> hf.PreTrainedTokenizerFast:
    """A token for each letter; `ends`: [CLS] and [SEP] around a text; another `shift`: other numbers."""
    letters = LETTERS[shift:] + LETTERS[:shift]
    words = {word: number for number, word in enumerate([*SPECIAL, *letters])}
    made = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    if ends:
        made.post_processor = processors.BertProcessing(("[SEP]", words["[SEP]"]), ("[CLS]", words["[CLS]"]))
    named = {"pad": "PAD", "unk": "UNK", "cls": "CLS", "sep": "SEP", "mask": "MASK"}
    if not ends:
        named = {"pad": "PAD", "unk": "UNK", "bos": "BOS", "eos": "EOS"}
    special: dict[str, Any] = {f"{name}_token": f"[{word}]" for name, word in named.items()}
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=made, model_input_names=["input_ids", "attention_mask"], **special
    )


KINDS: dict[str, tuple[Any, Any]] = {
    "causal": (hf.LlamaForCausalLM, llama_config),
    "masked": (hf.BertForMaskedLM, bert_config),
    "labels": (hf.BertForSequenceClassification, lambda: bert_config(num_labels=3)),
    "token labels": (hf.BertForTokenClassification, lambda: bert_config(num_labels=3)),
    "embeddings": (hf.BertModel, bert_config),
    "halves": (
        hf.T5ForConditionalGeneration,
        lambda: hf.T5Config(
            vocab_size=96, d_model=64, d_kv=16, d_ff=96, num_layers=1, num_heads=4, decoder_start_token_id=0
        ),
    ),
}
"""A tiny model of each kind that reads text: its class, and what makes its config."""


def saved(kind: str, folder: Path, seed: int = 0) -> Path:
    """A folder of a tiny model whose layers matter, and its tokenizer."""
    torch.manual_seed(seed)
    model_class, config = KINDS[kind]
    model = model_class(config())
    for name, weight in model.named_parameters():
        if weight.ndim == 2 and "embed" not in name:
            weight.data *= 4
    model.save_pretrained(folder)
    tokenizer(ends=kind not in ("causal", "halves")).save_pretrained(folder)
    return folder
