"""Tiny folders that an engine serves, prompts, and whether an answer is the one that transformers gives."""

from pathlib import Path
from typing import Any

import torch
import transformers as hf
from letters import tokenizer
from peft import LoraConfig, get_peft_model
from tiny_models import llama

from svdq_hf import SVDQConfig, quantize_model

VOCABULARY = len(tokenizer())

TIE = 1e-2
"""Logits nearer than this are a tie: either token is the greedy one."""


def folder_of(folder: Path, *, tie: bool = False, **choices: Any) -> Path:
    """A quantized random Llama with a tokenizer; engines want heads 32 wide, and pad the vocabulary."""
    made = tokenizer()
    model = llama(vocab_size=VOCABULARY, head_dim=32, max_position_embeddings=512, tie_word_embeddings=tie)
    quantize_model(model, SVDQConfig(**{"k": 32, **choices})).save_pretrained(folder)
    made.save_pretrained(folder)
    return folder


def adapted(folder: Path, adapter: Path) -> Any:
    """The folder's model under a random LoRA adapter on all of its layers, which is saved, too."""
    names = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
    choices = LoraConfig(r=8, lora_alpha=16, target_modules=names, init_lora_weights=False)
    model = get_peft_model(loaded(folder), choices)
    model.save_pretrained(adapter)
    return model.eval()


def prompts(count: int, vocabulary: int, longest: int = 40) -> list[list[int]]:
    """Prompts of random tokens, from one to `longest`."""
    drawn = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, longest + 1, (count,), generator=drawn).tolist()
    return [torch.randint(7, vocabulary, (length,), generator=drawn).tolist() for length in lengths]


def loaded(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The folder's model, as transformers loads it."""
    return hf.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@torch.no_grad()
def misses(model: Any, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """By how much each token of an answer misses the highest logit, given all tokens before it; `[tokens]`.

    Zero at each: the answer is transformers' own, token for token.
    """
    logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].float()
    chosen = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
    return logits.amax(1) - chosen


def check_answers(model: Any, asked: list[list[int]], told: list[list[int]], tokens: int) -> int:
    """Hold that each answer is greedy up to ties, and show those; how many are equal token for token."""
    equal = 0
    for prompt, answer in zip(asked, told, strict=True):
        assert len(answer) == tokens
        missed = misses(model, prompt, answer)
        worst = int(missed.argmax())
        if missed[worst] > 0:
            print(f"prompt of {len(prompt)}: token {worst} misses the highest logit by {missed[worst]:.2g}")
        assert missed[worst] <= TIE
        equal += bool(missed[worst] == 0)
    return equal
