"""The two ends of a model that is being loaded, its output head and its input embedding: are they packed?

What the config says and what the files hold must agree. Not here: the modules (`head`, `table`).
"""

from typing import Any

from transformers import PreTrainedModel

from svdq_hf.config import SVDQConfig
from svdq_hf.integrations.transformers.checkpoint_headers import REMEDY, Checkpoint
from svdq_hf.quantize.embedding import Embedding, find_embedding, input_embedding, input_table, reads_head
from svdq_hf.quantize.head import Head, find_head


def stored_head(model: PreTrainedModel, checkpoint: Checkpoint, config: SVDQConfig) -> Head | None:
    """The output head of a quantized checkpoint, where it is packed.

    Raises:
        ValueError: the config and the files disagree, or the model has no place for a packed head.
    """
    output = getattr(model, "get_output_embeddings", lambda: None)()
    if not config.lm_head:
        _refuse_packed(model, checkpoint, output, "lm_head")
        return None
    if not checkpoint.entries:
        raise ValueError("a model of which lm_head is quantized loads from a folder, not from a state dict")
    embedding = model.get_input_embeddings()
    names = [name for name, module in model.named_modules() if module is embedding]
    if output is None and any(f"{name}.weight" in checkpoint.entries for name in names):
        return None  # loaded for something else, with an embedding of its own
    head = find_head(model, checkpoint.entries)
    if not _is_packed(checkpoint, head.name):
        raise ValueError(f"config.json says lm_head: true, the files hold {head.name} dense. {REMEDY}")
    return head


def stored_embedding(
    model: PreTrainedModel, checkpoint: Checkpoint, config: SVDQConfig, head: Head | None
) -> Embedding | None:
    """The input embedding of a quantized checkpoint, where it is packed in parts of its own.

    Raises:
        ValueError: the config says that it is dense, and the files hold it packed.
    """
    if not config.embeddings:
        _refuse_packed(model, checkpoint, input_embedding(model), "embeddings")
        return None
    packed = list(input_table(model, config))
    if checkpoint.entries:  # what a file holds is not for names to decide
        packed = [name for name in packed if _is_packed(checkpoint, name)]
    elif reads_head(model, head):
        packed = []
    return find_embedding(model, checkpoint.entries) if packed else None


def config_key_by_module(head: Head | None, table: Embedding | None) -> dict[str, str]:
    """The choice that asks for each of the two that are there, by its name in the model."""
    pairs = ((head, "lm_head"), (table, "embeddings"))
    return {one.name: choice for one, choice in pairs if one is not None}


def _is_packed(checkpoint: Checkpoint, name: str) -> bool:
    return f"{name}.salient_rows" in checkpoint.entries


def _refuse_packed(model: PreTrainedModel, checkpoint: Checkpoint, module: Any, choice: str) -> None:
    for name, one in model.named_modules():
        if one is module and _is_packed(checkpoint, name):
            raise ValueError(f"config.json says {choice}: false, the files hold {name} packed. {REMEDY}")
